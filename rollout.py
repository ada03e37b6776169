"""Multi-turn rollouts, token in, token out: the ids that are trained are the ids that were sampled.

Turn k: read the history s_k, sample o_k until `</answer>` or the end of the turn, give a_k to the environment, append
what it answers (Setting of arXiv:2605.14558v1, Eq. (1)). Nothing is decoded and encoded again.

B = P prompts · G rollouts, T tokens, V vocabulary; C tokens a forward pass, `slots` the cache's rows.
Fast because the cache is allocated ahead and updated in place, a group's prompt is run once, finished rows leave the
batch, and rows wait to read their observations together while the others write. Slots are kept in the order
writers | readers | free, so every forward pass works on a view of the cache.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import lru_cache

import torch
from tokenizers.decoders import DecodeStream
from torch import Tensor
from torch.nn import functional
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from actfocus import answer_span, classify_tokens
from envs import Episode
from policy import load_model, one_line, opening_text, pad, turn_text


class PromptTooLong(ValueError):
    """A level's first prompt leaves no room for a response."""


@dataclass
class Trajectory:
    """One episode as tokens, and what the rollout policy said of each; lists of length T, 0 outside the response."""

    episode: Episode
    tokens: list[int]
    is_response: list[bool]
    is_action: list[bool]  # shorter by the response in progress, whose classes `close` appends
    logp: list[float]  # log π_old at the sampling temperature, nats
    entropy: list[float]  # of π_old, nats
    score_norm: list[float]  # ‖∇ log π_old(yₜ)‖ with respect to the logits
    spans: list[tuple[int, int]] = field(default_factory=list)  # responses o_k: tokens[start:end]
    first_turn: int = 0  # turns before it were sampled by the trajectory this one was forked from

    @classmethod
    def start(cls, episode: Episode, prompt: Sequence[int]) -> "Trajectory":
        """A trajectory that has only read its prompt."""
        row = cls(episode, [], [], [], [], [], [])
        row.read(prompt)
        return row

    def fork(self, turn: int, replica: int) -> "Trajectory":
        """The prefix before response `turn` as a trajectory to be continued."""
        end = self.spans[turn][0]
        columns = (self.tokens, self.is_response, self.is_action, self.logp, self.entropy, self.score_norm)
        prefix = [column[:end] for column in columns]
        return Trajectory(self.episode.fork(turn, replica), *prefix, self.spans[:turn], turn)

    def read(self, ids: Sequence[int]) -> None:
        """Append tokens that the policy did not write."""
        self.tokens += ids
        for column in (self.is_response, self.is_action, self.logp, self.entropy, self.score_norm):
            column += [0] * (len(self.tokens) - len(column))

    def write(self, token: int, logp: float, entropy: float, score_norm: float) -> None:
        """Append one sampled token."""
        self.tokens.append(token)
        self.is_response.append(True)
        self.logp.append(logp)
        self.entropy.append(entropy)
        self.score_norm.append(score_norm)

    def close(self, tokenizer: PreTrainedTokenizerBase) -> str | None:
        """End the response in progress, classify its tokens, and return its answer, None without the structure."""
        start = len(self.is_action)
        pieces = token_pieces(tokenizer, self.tokens[start:])
        self.is_action += classify_tokens(pieces)[1].tolist()
        self.spans.append((start, len(self.tokens)))
        text = "".join(pieces)
        return text[slice(*span)] if (span := answer_span(text)) else None


@dataclass
class Batch:
    """Trajectories as padded tensors, (B, T) unless said otherwise; the lower half comes with the training step.

    The whole is small and stays on the CPU, whatever the models' device; `take` copies a micro-batch there.
    """

    tokens: Tensor
    is_response: Tensor
    is_action: Tensor
    is_reasoning: Tensor
    old_logp: Tensor
    entropy: Tensor
    score_norm: Tensor
    turn: Tensor  # k of the response oₖ the token belongs to, from 0; -1 outside
    is_turn_end: Tensor  # the last token of its response
    rewards: Tensor  # rₖ on the last token of oₖ, else 0
    returns: Tensor  # (B,) R(τ)
    lengths: Tensor  # (B,) tokens of each row
    ref_logp: Tensor | None = None
    energy: Tensor | None = None
    signal: Tensor | None = None  # what Eq. (5) standardises, the energy by default
    is_tag: Tensor | None = None  # where tags have a weight of their own
    advantages: Tensor | None = None
    values: Tensor | None = None  # the critic's, before the update
    value_targets: Tensor | None = None
    weights: Tensor | None = None

    @classmethod
    def of(cls, rows: Sequence[Trajectory]) -> "Batch":
        """Pad on the right; what is padding is known from lengths, never from ids."""
        is_response = pad([row.is_response for row in rows], torch.bool)
        is_action = pad([row.is_action for row in rows], torch.bool)
        logp, entropy, score_norm = (
            pad([getattr(row, name) for row in rows], torch.float32) for name in ("logp", "entropy", "score_norm")
        )
        turn, rewards = torch.full(is_response.shape, -1), torch.zeros(is_response.shape)
        is_turn_end = torch.zeros_like(is_response)
        for b, row in enumerate(rows):
            for k, (start, end) in enumerate(row.spans):
                turn[b, start:end], is_turn_end[b, end - 1], rewards[b, end - 1] = k, True, row.episode.rewards[k]
        return cls(pad([row.tokens for row in rows], torch.int64), is_response, is_action, is_response & ~is_action,
                   logp, entropy, score_norm, turn, is_turn_end, rewards,
                   torch.tensor([row.episode.return_ for row in rows]),
                   torch.tensor([len(row.tokens) for row in rows]))

    def keep(self, mask: Tensor) -> None:
        """Only the response tokens in `mask` are trained from now on; what follows a row's last one is cut off."""
        for name in ("is_response", "is_action", "is_reasoning"):
            setattr(self, name, getattr(self, name) & mask)
        positions = torch.arange(1, mask.shape[1] + 1)
        self.lengths = torch.where(self.is_response, positions, 1).amax(1)

    def take(self, index: Sequence[int] | Tensor, device: torch.device | str = "cpu") -> "Batch":
        """The rows at `index`, as wide as the longest of them, where a model can read them."""
        width = int(self.lengths[index].max())
        columns = (None if (x := getattr(self, f.name)) is None else x[index] for f in fields(self))
        return Batch(*(x if x is None else (x if x.dim() == 1 else x[:, :width]).to(device) for x in columns))

    def final_rewards(self) -> Tensor:
        """R(τ) on every row's last response token, 0 elsewhere."""
        left = self.is_response.flip(1).cumsum(1).flip(1)  # response tokens from t on
        return torch.where(self.is_response & (left == 1), self.returns[:, None], 0.0)


class SlotCache(Cache):
    """Keys and values of all rows, allocated ahead; a row's entry for position t lies at index t of its slot."""

    def __init__(self):
        super().__init__(layers=[])
        self.prefixes: list[Tensor] = []  # keys and values of each layer in turn, from the first pass
        self.store: Tensor | None = None  # all of them, (2 · layers, slots, heads, capacity, head width)
        self.width = self.clean = 0  # positions in use by the pass in progress; positions zeroed so far

    def aim(self, start: int, positions: Tensor) -> Tensor:
        """Point the next forward pass at slots start, start + 1, … and give its attention mask, (R, 1, C, width)."""
        self.start, self.positions, self.width = start, positions, int(positions.max()) + 1
        self.rows = torch.arange(len(positions), device=positions.device)[:, None]
        while self.store is not None and self.clean < self.width:
            self._extend(64)
        return torch.arange(self.width, device=positions.device) <= positions[:, None, :, None]

    def update(self, keys: Tensor, values: Tensor, layer: int, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Write (R, heads, C, head width) at the aimed slots; give everything up to the widest position."""
        if self.store is None:  # the first pass, over the prompts
            self.prefixes += [keys, values]
            return keys, values
        pair = self.store[2 * layer : 2 * layer + 2, self.start : self.start + len(keys)]
        for view, new in zip(pair, (keys, values), strict=True):
            view[self.rows, :, self.positions] = new.transpose(1, 2).to(view.dtype)
        return pair[0, :, :, : self.width], pair[1, :, :, : self.width]

    def get_seq_length(self, layer: int = 0) -> int:
        """Required by transformers; positions are always passed explicitly."""
        return 0

    def expand(self, index: Tensor, capacity: int) -> None:
        """Slot i becomes a copy of prefix index[i], with room for `capacity` positions (touched only when used)."""
        count, (_, heads, self.clean, width) = len(self.prefixes), self.prefixes[0].shape
        self.store = self.prefixes[1].new_empty(count, len(index), heads, max(capacity, self.clean), width)
        for part, tensor in zip(self.store, self.prefixes, strict=True):
            part[:, :, : self.clean] = tensor[index]
        self.prefixes = []

    def copy(self, source: int, target: int, length: int) -> None:
        """Overwrite a slot with the first `length` positions of another."""
        self.store[:, target, :, :length] = self.store[:, source, :, :length]

    def swap(self, one: int, other: int, length: int) -> None:
        """Exchange the first `length` positions of two slots."""
        kept = self.store[:, one, :, :length].clone()
        self.copy(other, one, length)
        self.store[:, other, :, :length] = kept

    def _extend(self, more: int) -> None:
        """Zero the next positions: what is masked still must not be NaN."""
        if self.store.shape[3] < self.clean + more:
            self.store = functional.pad(self.store, (0, 0, 0, more))
        self.store[:, :, :, self.clean : self.clean + more] = 0
        self.clean += more


class Engine:
    """A model and its cache: one forward pass over adjacent slots."""

    def __init__(self, model: PreTrainedModel):
        self.model, self.cache = model, SlotCache()

    def forward(self, pending: Sequence[Sequence[int]], start: int, seen: Sequence[int]) -> Tensor:
        """Read `pending[i]` in slot start + i after its `seen[i]` tokens; (R, V) logits after each row's last token."""
        device = self.model.device
        tokens = pad(pending, torch.int64).to(device)  # (R, C)
        positions = torch.tensor(seen, device=device)[:, None] + torch.arange(tokens.shape[1], device=device)
        mask = self.cache.aim(start, positions)  # padding lies beyond a row's end: never attended to, overwritten later
        last = torch.tensor([len(ids) - 1 for ids in pending], device=device)
        real = positions.minimum(positions.gather(1, last[:, None]))  # no position the model has never heard of
        hidden = self.model.base_model(input_ids=tokens, position_ids=real, attention_mask=mask,
                                       past_key_values=self.cache, use_cache=True).last_hidden_state
        return self.model.get_output_embeddings()(hidden[torch.arange(len(last), device=device), last]).float()


def load_policy(name: str, device: torch.device | str = "cpu") -> PreTrainedModel:
    """A model as `load_model` gives it, of which it is sure that an `Engine` writes what the model says.

    Else a ValueError: recurrent layers do not, nor does attention that does not know masks of true and false.
    """
    model = load_model(name, device)
    try:
        known = _engine_agrees(model)
    except Exception as error:
        raise ValueError(f"cannot use model {name!r}: rollouts fail with it ({one_line(error)})") from None
    if not known:
        raise ValueError(f"cannot use model {name!r}: it does not follow the rollouts' masks or positions")
    return model


@torch.no_grad()
def _engine_agrees(model: PreTrainedModel) -> bool:
    """Whether two rows of unlike lengths, read and then written, have the logits of a pass without cache and mask."""
    rows = [[i % model.get_input_embeddings().num_embeddings for i in range(length)] for length in (9, 6)]
    engine = Engine(model)
    engine.forward([row[:-3] for row in rows], 0, [0, 0])
    engine.cache.expand(torch.arange(2), 9)
    for left in (3, 2, 1):
        logits = engine.forward([[row[-left]] for row in rows], 0, [len(row) - left for row in rows])
    plain = [model(input_ids=torch.tensor([row], device=model.device), use_cache=False).logits[0, -1] for row in rows]
    return torch.allclose(logits, torch.stack(plain).float(), rtol=1e-3, atol=1e-2)


def rollout(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, episodes: Sequence[Episode],
    generator: torch.Generator | None, temperature: float = 1.0, max_response_tokens: int = 96,
    max_context: int = 2048, engine: Engine | None = None,
) -> list[Trajectory]:
    """Play every fresh episode to its end under `model`; arguments and errors as in `play_on`."""
    texts = [opening_text(tokenizer, episode.system(), episode.user()) for episode in episodes]
    prompts = {text: tokenizer.encode(text, add_special_tokens=False) for text in dict.fromkeys(texts)}
    rows = [Trajectory.start(episode, prompts[text]) for episode, text in zip(episodes, texts, strict=True)]
    return play_on(model, tokenizer, rows, generator, temperature, max_response_tokens, max_context, engine)


@torch.no_grad()
def play_on(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[Trajectory],
    generator: torch.Generator | None, temperature: float = 1.0, max_response_tokens: int = 96,
    max_context: int = 2048, engine: Engine | None = None,
) -> list[Trajectory]:
    """Continue B trajectories, each before a response, to the end of their episodes.

    Args:
        rows: equal prefixes are run once.   generator: of all sampling, on any device; with None every row
            has a generator of its own, seeded by its level, replica and forks, whoever is played beside it.
        temperature: > 0.   max_response_tokens: a longer response is cut, which makes its turn invalid.
        max_context: an episode whose next turn might not fit ends there.
    Returns:
        The same B trajectories, in order.
    Raises:
        ValueError: temperature not above 0.   PromptTooLong: a prompt that leaves no room for a response.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    engine = engine or Engine(model)
    logits = _read_prefixes(engine, rows, max_context - max_response_tokens, max_context)
    order, pending = list(rows), {}  # slot → trajectory; id of a waiting trajectory → tokens it has still to read
    ends, may_close, draw = _ends_turn(model, tokenizer), _may_close(tokenizer), _noise(generator, rows)
    writing = live = len(order)
    while live:
        if 2 * (live - writing) >= writing:  # enough readers: let them read together
            new = [pending.pop(id(row)) for row in order[writing:live]]
            seen = [len(row.tokens) - len(ids) for row, ids in zip(order[writing:live], new, strict=True)]
            logits, writing = torch.cat([logits, engine.forward(new, writing, seen)]), live
        ended = _write(order[:writing], logits, temperature, draw, ends, may_close, tokenizer, max_response_tokens)
        for slot in reversed(ended):
            row, writing = order[slot], writing - 1
            message = row.episode.act(row.close(tokenizer))
            ids = [] if message is None else _turn_ids(tokenizer, message, row.tokens[-1], ends)
            if message is None or len(row.tokens) + len(ids) + max_response_tokens > max_context:
                live -= 1
                _move(engine, order, writing, slot)  # the last writer fills the gap, the last reader the writer's place
                _move(engine, order, live, writing)
            else:
                _swap(engine, order, slot, writing)
                pending[id(row)] = [row.tokens[-1], *ids]  # the last sampled token has not been read yet either
                row.read(ids)
        if writing:
            writers = order[:writing]
            logits = engine.forward([row.tokens[-1:] for row in writers], 0, [len(row.tokens) - 1 for row in writers])
        else:
            logits = logits[:0]
    return rows


def _read_prefixes(engine: Engine, rows: Sequence[Trajectory], room: int, capacity: int) -> Tensor:
    """Every different prefix once, then a copy of its cache for each of its rollouts; (B, V) logits after it."""
    prefixes = list(dict.fromkeys(tuple(row.tokens) for row in rows))
    longest = max(map(len, prefixes))
    if longest > room:
        raise PromptTooLong(f"a prompt of {longest} tokens leaves no room for a response: max_context allows {room}")
    logits = engine.forward(prefixes, 0, [0] * len(prefixes))
    number = {prefix: i for i, prefix in enumerate(prefixes)}
    index = torch.tensor([number[tuple(row.tokens)] for row in rows], device=logits.device)
    engine.cache.expand(index, capacity)
    return logits[index]


def _noise(generator: torch.Generator | None, rows: Sequence[Trajectory]) -> Callable[[Sequence[Trajectory]], Tensor]:
    """What draws (R, 1) numbers in [0, 1) for the rows that are writing."""
    if generator is not None:
        return lambda writers: torch.rand(len(writers), 1, generator=generator, device=generator.device)
    lucks = {id(row): (row.episode.seed, row.episode.replica, row.episode.reseeds) for row in rows}
    own = {row: random.Random(str(luck)) for row, luck in lucks.items()}  # Careful: forks of a row need other numbers
    return lambda writers: torch.tensor([[own[id(row)].getrandbits(24) / 2**24] for row in writers])


def _write(rows, logits, temperature, draw, ends, may_close, tokenizer, max_response_tokens) -> list[int]:
    """Sample one token for every row; returns the numbers of the rows whose response ended with it."""
    logq = (logits / temperature).log_softmax(-1)  # (R, V)
    probs = logq.exp()
    cumulative = probs.cumsum(1)  # inverse transform sampling: a tenth of torch.multinomial's time
    reached = draw(rows).to(probs.device) * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, reached, right=True).clamp(max=probs.shape[1] - 1)  # (R, 1)
    chosen = logq.gather(1, tokens)
    entropy = -(probs * logq).sum(1, keepdim=True)
    norm = (1 - 2 * chosen.exp() + probs.square().sum(1, keepdim=True)).clamp(min=0).sqrt()  # ‖onehot - p‖
    ended, columns = [], torch.cat([chosen, entropy, norm], 1).tolist()
    for i, (row, token, numbers) in enumerate(zip(rows, tokens[:, 0].tolist(), columns, strict=True)):
        row.write(token, *numbers)
        written = len(row.tokens) - len(row.is_action)
        closed = token in may_close and "</answer>" in tokenizer.decode(row.tokens[-min(written, 9) :])
        if token in ends or closed or written == max_response_tokens:
            ended.append(i)
    return ended


def _ends_turn(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """All eos tokens, and the special one that the chat template puts after a response, where that is another."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    first = tokenizer.encode(turn_text(tokenizer, ""), add_special_tokens=False)[:1]
    special = {i for i in first if i in (added := tokenizer.added_tokens_decoder) and added[i].special}
    return {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} | special


@lru_cache(maxsize=1)  # 0.4 s with 150,000 tokens, and CARL asks in every round
def _may_close(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens with which an answer can close; only there is text looked at."""
    return {i for i, text in enumerate(tokenizer.batch_decode([[i] for i in range(len(tokenizer))])) if ">" in text}


def _turn_ids(tokenizer: PreTrainedTokenizerBase, message: str, last: int, ends: set[int]) -> list[int]:
    """The tokens between two responses; the end-of-turn token is not said twice."""
    ids = tokenizer.encode(turn_text(tokenizer, message), add_special_tokens=False)
    return ids[1:] if last in ends and ids[0] == last else ids


def _move(engine: Engine, order: list[Trajectory], source: int, target: int) -> None:
    if source != target:
        engine.cache.copy(source, target, len(order[source].tokens))
        order[target] = order[source]


def _swap(engine: Engine, order: list[Trajectory], one: int, other: int) -> None:
    if one != other:
        engine.cache.swap(one, other, max(len(order[one].tokens), len(order[other].tokens)))
        order[one], order[other] = order[other], order[one]


def token_pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """The text each token adds; together the response's text. First bytes of a split character add ""."""
    stream, pieces = DecodeStream(skip_special_tokens=False), []
    for token in ids:
        try:
            pieces.append(stream.step(tokenizer.backend_tokenizer, token) or "")
        except Exception:  # a single-byte token after broken bytes, with Llama 2's kind: what came before is settled
            stream = DecodeStream(skip_special_tokens=False)
            pieces.append(stream.step(tokenizer.backend_tokenizer, token) or "")
    return pieces
