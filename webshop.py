"""WebShop in plain Python: find the product an instruction asks for, choose its options, buy it.

The third game of the paper's tables (arXiv:2605.14558v1), after Yao et al. 2022 (princeton-nlp/WebShop, MIT): no Java,
no server, no spaCy. Same interface as the games in `envs.py`, but the legal actions depend on the page.

    score = (attributes matched + options matched + [price ≤ U]) / (n_attributes + n_options + 1) · r_type

`WebShop(data=FOLDER)` reads the official files, `WebShop()` a small shop of ours; `catalogue.py` holds both. Goals are
shuffled as in the original: 0-499 test, 500-1,499 validation, the rest training; for smaller shops see `split_goals`.
Seeds below 1,000,000 pick test goals and all others training goals: number seed mod n.

    python envs.py --env webshop --seed 3

Differs from the original: price limits do not stop at 990; an option is compared with "name value" of the goal after
the colours of both are normalised; the chosen options stand on the page.
"""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from itertools import product as combinations
from operator import itemgetter
from pathlib import Path

import numpy as np
from rapidfuzz import fuzz, utils

from catalogue import BEST, Product, SearchIndex, load_products

FIRST_TRAIN_SEED = 1_000_000  # of all games: evaluation levels lie below, the warm start's far above
SUB_PAGES = ("description", "features", "reviews")
COLORS = (  # searched in this order: light blue and dark blue are blue, but dark green is dark
    "apricot aqua ash azure beige black blue blush bordeaux bronze brown burgundy camel camo caramel champagne "
    "charcoal cheetah chestnut chocolate christmas coffee cognac copper coral cranberry cream dark denim eggplant "
    "espresso fuchsia gold granite grape graphite grass gray green grey heather indigo ivory khaki lavender lemon "
    "leopard light lilac lime magenta maroon mauve midnight mint mocha multicolor mustard natural navy nude olive "
    "orange peach pewter pink plum purple rainbow red rose royal rust sand sapphire silver slate steel stone "
    "sunflower tan taupe teal turquoise violet walnut wheat white wine yellow"
)
ACTION = re.compile(r"(search|click)\s*\[(.*)\]", re.IGNORECASE | re.DOTALL)


@dataclass(frozen=True)
class Goal:
    """What the shopper is asked to buy."""

    asin: str
    text: str
    attributes: tuple[str, ...]
    options: dict[str, str]
    price_limit: int  # U, dollars


@dataclass(frozen=True)
class Page:
    """Where the shopper is: page name, the results behind it, the product on it, the options chosen there."""

    name: str = "search"
    found: tuple[str, ...] = ()
    number: int = 0  # of the result page, from 0
    asin: str = ""
    chosen: tuple[tuple[str, str], ...] = ()


def similar(one: str, other: str) -> bool:
    """Whether two phrases share nearly all their words: token_set_ratio > 85, case and punctuation aside."""
    return fuzz.token_set_ratio(one, other, processor=utils.default_process) > 85


def normal_color(value: str) -> str:
    """The first known colour word contained, else the value itself."""
    return next((color for color in COLORS.split() if color in value), value)


def has_attribute(bought: Product, attribute: str) -> bool:
    """Similar to one of the product's attributes, or a substring of title, bullets or description."""
    texts = (bought.title, " ".join(bought.bullets), bought.description)
    return any(similar(own, attribute) for own in bought.attributes) or any(
        attribute.lower() in text.lower() for text in texts
    )


def has_option(chosen: dict[str, str], name: str, value: str) -> bool:
    """Some chosen value is similar to "name value" of the goal, colours normalised."""
    asked = f"{name} {normal_color(value)}"
    return any(similar(normal_color(own), asked) for own in chosen.values())


def type_factor(bought: Product, wanted: Product) -> float:
    """r_type: 1 for the same kind of product, down to 0 for titles without a common noun.

        title score = |nouns(bought) ∩ nouns(wanted)| / |nouns(wanted)|      (0.2 where the title has no noun)
        r_type = 0      title score = 0
                 0.1    title score < 0.1
                 1      same query, or ≥ 2 shared parts of the category path, or title score > 0.2
                 0.5    else
    """
    common = len(bought.nouns & wanted.nouns)
    title_score = common / wanted.num_nouns if wanted.num_nouns else 0.2
    if title_score < 0.1:
        return 0.1 if title_score > 0 else 0.0
    alike = bought.query == wanted.query or len(bought.path & wanted.path) >= 2 or title_score > 0.2
    return 1.0 if alike else 0.5


def purchase_score(bought: Product, chosen: dict[str, str], goal: Goal, wanted: Product) -> float:
    """The raw score of a purchase, in [0, 1].

        (attributes matched + options matched + [price ≤ U]) / (n_attributes + n_options + 1) · r_type
    """
    matched = sum(has_attribute(bought, attribute) for attribute in goal.attributes)
    matched += sum(has_option(chosen, name, value) for name, value in goal.options.items())
    matched += bought.price <= goal.price_limit
    return matched / (len(goal.attributes) + len(goal.options) + 1) * type_factor(bought, wanted)


def make_goals(products: list[Product], seed: int = 233) -> list[Goal]:
    """One goal per product with an instruction and combination of its options, shuffled as in the original.

    U is the larger of two different draws from the next four multiples of 10 above the price.
    """
    rng, goals = np.random.default_rng(seed), []
    for item in products:
        if item.instruction is None:
            continue
        limit = 10 * (int(item.price // 10) + 1 + int(rng.permutation(4)[:2].max()))
        names = sorted(item.options)
        for values in combinations(*(item.options[name] for name in names)):
            asked = ", and ".join(f"{name}: {value}" for name, value in zip(names, values, strict=True))
            text = f"{item.instruction} with {asked}" if asked else item.instruction
            text += f", and price lower than {limit:.2f} dollars"
            goals.append(Goal(item.asin, text, item.wanted, dict(zip(names, values, strict=True)), limit))
    random.Random(seed).shuffle(goals)
    return goals


@cache
def open_shop(folder: str | None) -> tuple[dict[str, Product], SearchIndex, list[Goal]]:
    """Products by ASIN, search and goals, made once per process and folder."""
    products, index = load_products(folder)
    goals = make_goals(list(products.values()))
    if not goals:
        raise ValueError(f"{folder}: no product has the field 'instruction', so there is no goal")
    return products, index, goals


def split_goals(goals: list[Goal]) -> dict[str, list[Goal]]:
    """Test, validation and training goals: 500, 1,000 and the rest of 6,910, in smaller shops the same shares.

    But a test share below 128, the levels of an evaluation, takes what it can from validation. Every share has a goal;
    with fewer than three goals the shares that would be empty are the whole list.
    """
    train = min(1500, max(2, len(goals) * 1500 // 6910))
    test = min(500, max(len(goals) * 500 // 6910, min(128, train - 1)))
    parts = {"test": goals[:test], "validation": goals[test:train], "train": goals[train:]}
    return {name: part or goals for name, part in parts.items()}


class WebShop:
    """Search, click through pages, choose options, buy. Reward only at `buy now`: the raw score of the purchase.

    Success is a raw score of 1; `strict` pays 1 then and else 0. `results_per_page` and `title_words` (0: whole
    titles) shorten the pages for small models; `short_pages` names every button once and the goal only on the search
    page.
    """

    max_turns, actions_per_turn, max_actions = 9, 1, 9
    moves = "search[words], click[button]"
    task = (
        "You are shopping in a web shop: buy the product the instruction asks for.\n"
        "On the search page, search[words] looks for products. Everywhere else, click[button] follows a button: a "
        "product's ID opens its page; there, choose the options asked for by their values, then click[buy now], which "
        "ends the game. The page's buttons stand below it.\n"
        "The purchase earns the share of asked attributes, options and price limit that it meets, at most 1; less, or "
        "nothing, for another kind of product."
    )
    brief = "WebShop: search, open a product, choose options, buy."

    def __init__(
        self, data: str | Path | None = None, results_per_page: int = 10, title_words: int = 0, strict: bool = False,
        short_pages: bool = False,
    ):
        if results_per_page < 1 or title_words < 0:
            raise ValueError(f"webshop needs results_per_page >= 1 and title_words >= 0, got {results_per_page}, "
                             f"{title_words}")
        self.results_per_page, self.title_words = results_per_page, title_words
        self.strict, self.short_pages = strict, short_pages
        self.products, self.index, self.goals = open_shop(str(Path(data).resolve()) if data else None)
        self.parts = split_goals(self.goals)

    def reset(self, seed: int, replica: int = 0) -> tuple[str, dict]:
        """Goal number `seed`, round and round. Nothing is left to luck, so the replica changes nothing."""
        goals = self.goals_of(seed)
        self.goal = goals[seed % len(goals)]
        self.page, self.actions_left = Page(), self.max_actions
        return self._observe(), {"success": False, "valid": True, "purchased": False, "score": 0.0}

    def goals_of(self, seed: int) -> list[Goal]:
        """The goals among which a level's seed chooses; evaluation and training have different ones."""
        return self.parts["test" if seed < FIRST_TRAIN_SEED else "train"]

    def reseed(self, replica: int) -> None:
        """Other luck from here on: there is none."""

    def step(self, action: str) -> tuple[str, float, bool, bool, dict]:
        """Search or click; anything the page does not offer moves nothing and costs no action."""
        page, reward, score = self._follow(self.page, action), 0.0, 0.0
        valid = page is not None
        if valid:
            self.page, self.actions_left = page, self.actions_left - 1
        bought = self.page.name == "bought"
        if bought:
            wanted = self.products[self.goal.asin]
            score = purchase_score(self.products[self.page.asin], dict(self.page.chosen), self.goal, wanted)
            reward = (float(score == 1) if self.strict else score) * valid
        info = {"success": score == 1, "valid": valid, "purchased": bought, "score": score}
        return self._observe(), reward, bought, not bought and self.actions_left <= 0, info

    def legal_actions(self) -> list[str]:
        """The page's clicks; on the search page, of all the searches the one for the instruction."""
        if self.page.name == "search":
            return [_as_search(self.goal.text)]
        return [f"click[{button}]" for button in self._buttons(self.page)]

    def best_actions(self) -> list[str]:
        """The oracle's next actions, each as good: it knows the goal's product. Empty after the purchase."""
        page, goal = self.page, self.goal
        if page.name == "search":
            return self._best_searches()
        if page.name == "results":
            shelf = page.found.index(goal.asin) // self.results_per_page if goal.asin in page.found else None
            turn = "back to search" if shelf is None else "next >" if shelf > page.number else "< prev"
            return [f"click[{goal.asin.lower() if shelf == page.number else turn}]"]
        if page.name == "item" and page.asin == goal.asin:
            missing = [v for v in dict.fromkeys(goal.options.values()) if v not in dict(page.chosen).values()]
            return [f"click[{value}]" for value in missing if self.actions_left > 1] or ["click[buy now]"]
        return [] if page.name == "bought" else ["click[< prev]"]

    def solve(self, choose: Callable[[list[str]], str] = itemgetter(0)) -> list[str]:
        """The oracle's actions from here to the purchase, within the actions left; `choose` picks among the best."""
        page, left, plan = self.page, self.actions_left, []
        while self.actions_left > 0 and (best := self.best_actions()):
            plan.append(choose(best))
            self.page, self.actions_left = self._follow(self.page, plan[-1]), self.actions_left - 1
        self.page, self.actions_left = page, left
        return plan

    def _best_searches(self) -> list[str]:
        """Searches that put the goal's product on the earliest page: the goal's text, its instruction, the title."""
        wanted = self.products[self.goal.asin]
        ranks = {}
        for query in (self.goal.text, wanted.instruction, wanted.title):
            found = self.index.search(query)
            rank = found.index(wanted.asin) if wanted.asin in found else BEST * self.results_per_page
            ranks.setdefault(_as_search(query), rank // self.results_per_page)
        return [search for search, rank in ranks.items() if rank == min(ranks.values())]

    def _shown(self, page: Page) -> tuple[str, ...]:
        start = page.number * self.results_per_page
        return page.found[start : start + self.results_per_page]

    def _buttons(self, page: Page) -> list[str]:
        if page.name in ("search", "bought"):
            return []
        if page.name == "results":
            more = len(page.found) > (page.number + 1) * self.results_per_page
            asins = [asin.lower() for asin in self._shown(page)]
            return ["back to search"] + ["< prev"] * (page.number > 0) + ["next >"] * more + asins
        values = [value for group in self.products[page.asin].options.values() for value in group]
        below = [*values, *SUB_PAGES, "buy now"] if page.name == "item" else []
        return list(dict.fromkeys(["back to search", "< prev", *below]))

    def _follow(self, page: Page, action: str) -> Page | None:
        """The page an action leads to, None where this page does not offer it."""
        match = ACTION.fullmatch(action.strip())
        verb, words = (match[1].lower(), match[2].strip().lower()) if match else ("", "")
        if verb == "search":
            return Page("results", tuple(self.index.search(words))) if words and page.name == "search" else None
        if verb != "click" or words not in self._buttons(page):
            return None
        if words == "back to search":
            return Page()
        if page.name == "results" and words in ("next >", "< prev"):
            return replace(page, number=page.number + (1 if words == "next >" else -1))
        if page.name == "results":
            asin = next(asin for asin in self._shown(page) if asin.lower() == words)
            return replace(page, name="item", asin=asin)
        if words == "< prev":
            return Page("results", page.found, page.number) if page.name == "item" else replace(page, name="item")
        if words in SUB_PAGES or words == "buy now":
            return replace(page, name="bought" if words == "buy now" else words)
        group = [name for name, values in self.products[page.asin].options.items() if words in values][-1]
        return replace(page, chosen=tuple((dict(page.chosen) | {group: words}).items()))

    def _observe(self) -> str:
        page = self.page
        if page.name == "bought":
            return "Thank you for shopping with us!"
        if self.short_pages:
            return self._short_page(page)
        actions = self.moves.split(", ")[0] if page.name == "search" else ", ".join(self.legal_actions())
        texts = {"search": lambda _: ["Search"], "results": self._result_texts, "item": self._item_texts}
        shown = ["Instruction:", self.goal.text, *texts.get(page.name, self._sub_page_texts)(page)]
        return " [SEP] ".join(shown) + f"\nActions: {actions}"

    def _short_page(self, page: Page) -> str:
        if page.name == "search":
            return f"{self.goal.text}."
        buttons = self._buttons(page)
        if page.name == "results":
            lines = [f"{asin.lower()}: {self._title(asin).lower()} {self.products[asin].price_tag}"
                     for asin in self._shown(page)]
            return "\n".join([*lines, ", ".join(buttons[: -len(lines) or None])])
        item = self.products[page.asin]
        lines = [f"{name}: {', '.join(values)}" for name, values in item.options.items()]
        lines += [f"Chosen: {', '.join(value for _, value in page.chosen)}"] * bool(page.chosen)
        if page.name != "item":
            return "\n".join([*self._sub_page_texts(page)[2:], ", ".join(buttons)])
        values = {value for group in item.options.values() for value in group}
        return "\n".join([f"{self._title(page.asin).lower()} {item.price_tag}", *lines,
                          ", ".join(button for button in buttons if button not in values)])

    def _result_texts(self, page: Page) -> list[str]:
        turns = [button for button in ("< Prev", "Next >") if button.lower() in self._buttons(page)]
        texts = ["Back to Search", f"Page {page.number + 1} (Total results: {len(page.found)})", *turns]
        for asin in self._shown(page):
            texts += [asin, self._title(asin), self.products[asin].price_tag]
        return texts

    def _item_texts(self, page: Page) -> list[str]:
        item = self.products[page.asin]
        groups = [text for name, values in item.options.items() for text in (name, *values)]
        chosen = [f"Chosen: {', '.join(value for _, value in page.chosen)}"] if page.chosen else []
        return ["Back to Search", "< Prev", *groups, *chosen, self._title(page.asin), f"Price: {item.price_tag}",
                "Rating: N.A.", "Description", "Features", "Reviews", "Buy Now"]  # fmt: skip

    def _sub_page_texts(self, page: Page) -> list[str]:
        item = self.products[page.asin]
        texts = {"description": [item.description or "No Description"], "features": list(item.bullets), "reviews": []}
        return ["Back to Search", "< Prev", *texts[page.name]]

    def _title(self, asin: str) -> str:
        words = self.products[asin].title.split()
        return " ".join(words[: self.title_words or None])


def _as_search(text: str) -> str:
    return f"search[{' '.join(text.replace('|', ' ').split())}]"  # Careful: || separates the actions of an answer
