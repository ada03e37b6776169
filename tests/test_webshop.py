"""webshop.py and catalogue.py: the reward branch by branch, the pages, the search, bad data, the official products.

The official files are read where they are: WEBSHOP_DATA or ../shared/webshop beside the repository.
"""

import json
import math
import os
import random
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import catalogue
import webshop
from catalogue import Product, SearchIndex, split_words, stored_length
from config import Config
from envs import make_env
from methods import evaluation_levels
from webshop import Goal, Page, WebShop, purchase_score, type_factor

OFFICIAL = Path(os.environ.get("WEBSHOP_DATA", Path(__file__).parents[2] / "shared" / "webshop"))
official = pytest.mark.skipif(not OFFICIAL.is_dir(), reason=f"the official products are not in {OFFICIAL}")
GOLDEN = "B09QQP3356 B09Q8RD8YN B09QGK5XHZ B09QQJJ3KM B09S3BN15C B09ND9DP7J B09T756KQ5 B09Q67H373 B09R9YCM6R B09KLQLLT2"
SHIRT = Product(
    asin="B000000001", title="Elm Shirt for Men", description="Keeps you warm.", bullets=("Hand wash only.",),
    price=19.99, price_tag="$19.99", options={"size": ("small", "large"), "color": ("black", "dark blue")},
    query="shirts", path=frozenset({"Clothing", "Men", "Shirts"}), attributes=("long sleeve", "slim fit"),
    instruction="Find me a shirt", wanted=("long sleeve",), nouns=frozenset({"elm", "shirt", "men"}), num_nouns=3,
)  # fmt: skip
GOAL = Goal("B000000001", "text", ("long sleeve", "slim fit"), {"size": "large", "color": "black"}, 30)
ASKED = {"size": "large", "color": "black"}


def score(bought=SHIRT, chosen=ASKED, goal=GOAL, wanted=SHIRT):
    return purchase_score(bought, chosen, goal, wanted)


def test_the_product_with_its_options_in_its_price_scores_one():
    assert score() == 1  # (2 attributes + 2 options + 1 price) / (2 + 2 + 1) · 1


def test_a_price_at_the_limit_counts_and_one_above_does_not():
    assert score(replace(SHIRT, price=30.0)) == 1
    assert score(replace(SHIRT, price=30.01)) == 4 / 5  # (2 + 2 + 0) / 5


def test_an_attribute_counts_by_similar_words_or_as_a_substring_of_title_bullets_or_description():
    def of(asked, **changes):
        goal = replace(GOAL, attributes=(asked,), options={})
        return score(replace(SHIRT, **changes), {}, goal)  # (0 or 1 attribute + 1 price) / (1 + 0 + 1)

    assert of("sleeve long") == 1  # the same set of words
    assert of("Long-Sleeve") == 1  # case and punctuation aside
    assert of("long sleeves") == 1  # 2 · 11 / 23 letters = 95.7 > 85
    assert of("long slope") == 1 / 2
    assert of("hand wash") == of("warm") == of("elm shirt") == 1  # bullets, description, title
    assert of("wash only. keeps") == 1 / 2  # not across two texts
    assert of("long sleeve", attributes=()) == 1 / 2


def test_an_option_counts_for_any_chosen_value_similar_to_the_goals_name_and_value():
    def of(value, chosen, name="size"):
        return score(chosen=chosen, goal=replace(GOAL, attributes=(), options={name: value}))  # (0 or 1 + 1) / 2

    assert of("large", {"size": "large"}) == 1
    assert of("large", {"fit": "large"}) == 1  # the value counts, whatever its group
    assert of("large", {"size": "small"}) == of("large", {}) == 1 / 2
    assert of("x-large", {"size": "large"}) == 1  # known flaw of the original: {large} ⊂ {size, x, large}
    assert of("pack of 12", {"size": "pack of 6"}) == 1  # another: most words are shared
    assert of("twin pack", {"size": "single"}) == 1 / 2
    assert score(chosen={"size": "large"}) == 4 / 5  # (2 + 1 + 1) / 5
    assert score(chosen={"size": "small", "color": "dark blue"}) == 3 / 5  # (2 + 0 + 1) / 5


def test_colors_are_normalised_to_the_first_known_color_word_contained():
    for value, color in (
        ("light blue", "blue"), ("dark blue", "blue"), ("dark green", "dark"), ("a3-army\xa0green", "green"),
        ("green2", "green"), ("flavored", "red"), ("xx-large", "xx-large"), ("", ""),
    ):  # fmt: skip
        assert webshop.normal_color(value) == color
    goal = replace(GOAL, attributes=(), options={"color": "light blue"})
    assert score(chosen={"color": "navy blue"}, goal=goal) == 1  # both are blue
    assert score(chosen={"color": "light green"}, goal=goal) == 1 / 2


def test_the_kind_of_product_counts_by_query_path_or_title():
    nouns = tuple(f"noun{i}" for i in range(20))
    wanted = replace(SHIRT, query="a", path=frozenset("xyz"), nouns=frozenset(nouns), num_nouns=20)

    def of(shared, query="b", path="z"):
        return type_factor(replace(SHIRT, query=query, path=frozenset(path), nouns=frozenset(nouns[:shared])), wanted)

    assert of(0) == of(0, query="a") == of(0, path="xy") == 0  # no common noun: 0 whatever else
    assert of(1) == of(1, query="a") == of(1, path="xy") == 0.1  # 1 / 20 < 0.1
    assert of(2) == of(4) == 0.5  # 0.1 and 0.2 are neither < 0.1 nor > 0.2
    assert of(2, query="a") == of(2, path="xy") == of(2, path="xyz") == 1
    assert of(2, path="x") == 0.5  # one shared part is not enough
    assert of(5) == of(20) == 1  # 5 / 20 > 0.2
    assert type_factor(SHIRT, replace(wanted, nouns=frozenset(), num_nouns=0)) == 0.5  # counts as 0.2
    other = replace(SHIRT, price=99, query="x", path=frozenset(), nouns=frozenset({"men"}))
    assert score(other) == 4 / 5  # without the price, and 1 / 3 > 0.2
    assert score(replace(SHIRT, nouns=frozenset())) == 0


def test_there_is_a_goal_for_every_combination_of_options_and_none_without_an_instruction():
    goals = webshop.make_goals([SHIRT, replace(SHIRT, asin="B2", options={}), replace(SHIRT, instruction=None)])
    assert len(goals) == 2 * 2 + 1
    texts = {goal.text.split(", and price")[0] for goal in goals}
    assert "Find me a shirt with color: dark blue, and size: small" in texts and "Find me a shirt" in texts
    assert all(goal.text.endswith(f", and price lower than {goal.price_limit}.00 dollars") for goal in goals)


def test_the_price_limit_is_the_larger_of_two_of_the_next_four_tens():
    for price, tens in ((19.99, (30, 40, 50)), (20.0, (40, 50, 60)), (0.5, (20, 30, 40)), (2418.7, (2430, 2440, 2450))):
        items = [replace(SHIRT, price=price, options={}) for _ in range(600)]
        limits = Counter(goal.price_limit for goal in webshop.make_goals(items))
        # of the 6 pairs of the four, 1 has its larger at the second, 2 at the third, 3 at the fourth
        assert [round(limits[ten] / 100) for ten in tens] == [1, 2, 3] and limits.total() == 600


def test_splits_are_the_official_ones_and_their_shares_in_smaller_shops():
    parts = webshop.split_goals(list(range(6910)))
    assert (parts["test"], parts["validation"]) == (list(range(500)), list(range(500, 1500)))
    assert parts["train"] == list(range(1500, 6910))
    sizes = {count: [len(part) for part in webshop.split_goals(list(range(count))).values()] for count in (1121, 3455)}
    assert sizes == {1121: [128, 115, 878], 3455: [250, 500, 2705]}  # 243 = 1121 · 1500 / 6910 for test and validation
    for count in (3, 10, 100, 1110, 20_000):
        parts = webshop.split_goals(list(range(count)))
        assert sorted(goal for part in parts.values() for goal in part) == list(range(count)) and all(parts.values())
    assert webshop.split_goals([7]) == {"test": [7], "validation": [7], "train": [7]}


def test_training_and_evaluation_seeds_never_share_a_goal():
    env, seen = WebShop(), {}
    for kind, start in (("evaluation", 0), ("evaluation", 999_000), ("training", 1_000_000), ("training", 2**40)):
        for seed in range(start, start + 1000):
            env.reset(seed)
            seen.setdefault(kind, set()).add(env.goal.text + env.goal.asin)
    assert not seen["evaluation"] & seen["training"]
    assert len(seen["evaluation"]) == len(env.parts["test"]) and len(seen["training"]) == len(env.parts["train"])


def test_an_evaluation_meets_no_goal_twice():
    shop, seen = WebShop(), set()
    for level in evaluation_levels(Config(env="webshop")):
        shop.reset(level)
        seen.add(shop.goal.text + shop.goal.asin)
    assert len(seen) == 128
    with pytest.raises(ValueError, match=r"--eval_prompts 129: this shop has 128 goals to evaluate on"):
        evaluation_levels(Config(env="webshop", eval_prompts=129))


def test_short_pages_name_every_button_and_the_goal_on_the_search_page_only():
    env = WebShop(results_per_page=4, short_pages=True)
    shown, _ = env.reset(3)
    assert shown == f"{env.goal.text}."
    while not shown.startswith("Thank"):
        shown, *_ = env.step(env.best_actions()[0])
        names = [action.removeprefix("click[").removesuffix("]") for action in env.legal_actions()]
        assert all(name in shown for name in names) and (env.page.name == "bought" or names)
        assert env.goal.text not in shown and "[SEP]" not in shown
    for page in ("description", "features", "reviews"):
        env.reset(3)
        for action in (*env.solve()[:2], f"click[{page}]"):
            shown, *_ = env.step(action)
        assert env.page.name == page and shown.endswith("back to search, < prev")


def test_the_oracles_purchase_page_by_page():
    env = WebShop()
    observation, info = env.reset(0)
    assert info == {"success": False, "valid": True, "purchased": False, "score": 0.0}
    assert env.goal.text in observation
    assert observation.endswith(" [SEP] Search\nActions: search[words]") and env.actions_left == 9
    asin, wanted = env.goal.asin, env.products[env.goal.asin]
    plan = env.solve()
    assert plan == [f"search[{env.goal.text}]", f"click[{asin.lower()}]",
                    *(f"click[{value}]" for value in env.goal.options.values()), "click[buy now]"]  # fmt: skip
    observation, reward, terminated, truncated, info = env.step(plan[0])
    assert "Back to Search [SEP] Page 1 (Total results: 50) [SEP] Next > [SEP] B0" in observation
    assert f"{asin} [SEP] {wanted.title} [SEP] {wanted.price_tag}" in observation
    assert observation.split("\nActions: ")[1].split(", ")[:3] == env.legal_actions()[:3]
    observation, *_ = env.step(plan[1])
    for name, values in wanted.options.items():
        assert f" [SEP] {name} [SEP] {' [SEP] '.join(values)} [SEP] " in observation
    assert f"{wanted.title} [SEP] Price: {wanted.price_tag} [SEP] Rating: N.A. [SEP] Description" in observation
    for number, action in enumerate(plan[2:-1]):
        observation, reward, terminated, truncated, info = env.step(action)
        assert f"Chosen: {', '.join(list(env.goal.options.values())[: number + 1])}" in observation
        assert (reward, terminated, truncated, info["purchased"], info["success"]) == (0, False, False, False, False)
    assert env.legal_actions()[-1] == "click[buy now]"
    _, reward, terminated, truncated, info = env.step("click[buy now]")
    assert (reward, terminated, truncated) == (1, True, False)
    assert info == {"success": True, "valid": True, "purchased": True, "score": 1}
    assert env.legal_actions() == env.best_actions() == env.solve() == []
    assert env.step("click[buy now]")[1] == 0


def test_buttons_lead_where_they_say_and_leaving_the_product_forgets_its_options():
    env = WebShop()
    env.reset(3)
    env.step("search[Shoes for men]")
    found = env.index.search("shoes for men")
    assert env.page == Page("results", tuple(found)) and len(found) > 10
    assert "click[< prev]" not in env.legal_actions() and "click[next >]" in env.legal_actions()
    env.step("click[next >]")
    assert env.legal_actions()[:2] == ["click[back to search]", "click[< prev]"]
    asin = next(asin for asin in found[10:20] if env.products[asin].options)
    env.step(f"click[{asin.lower()}]")
    assert (env.page.name, env.page.asin) == ("item", asin)
    name, values = next(iter(env.products[asin].options.items()))
    for value in values:  # a group has one value: the last one clicked
        env.actions_left = 9
        env.step(f"click[{value}]")
        assert env.page.chosen == ((name, value),)
    texts = {"description": env.products[asin].description, "features": env.products[asin].bullets[0], "reviews": ""}
    for name, text in texts.items():
        assert text in env.step(f"click[{name}]")[0]
        assert env.legal_actions() == ["click[back to search]", "click[< prev]"]
        env.step("click[< prev]")
        assert env.page.name == "item" and env.page.chosen
        env.actions_left = 9
    env.step("click[< prev]")
    assert (env.page.name, env.page.number, env.page.chosen) == ("results", 1, ())
    env.step("click[< prev]")
    assert env.page.number == 0
    env.step("click[back to search]")
    assert env.page == Page()


def test_names_match_without_regard_to_case_and_outer_space():
    env = WebShop()
    env.reset(0)
    for action in (f"  SEARCH [ {env.goal.text.upper()} ]\n", f"Click[ {env.goal.asin} ]", "click[< PREV]"):
        assert env.step(action)[4]["valid"]
    assert env.page.name == "results"


def test_anything_the_page_does_not_offer_moves_nothing_and_costs_no_action():
    env = WebShop()
    observation, _ = env.reset(0)
    nothing = ["", " ", "search", "search[]", "search[ ]", "click[]", "click[buy now]", "buy now", "[x]"]
    nothing += ["search[a", "click[b000000000]", "fly[x]", "\0", "search\0[x]", "é", "click[back to search]"]
    for action in nothing:
        step = env.step(action)
        assert step[:4] == (observation, 0, False, False) and env.actions_left == 9, action
        assert step[4] == {"success": False, "valid": False, "purchased": False, "score": 0}
    env.step("search[shoes]")
    assert not env.step("search[shoes]")[4]["valid"]  # search on the search page only
    assert not env.step("click[next]")[4]["valid"] and env.actions_left == 8


def test_searches_without_a_known_word_find_nothing_and_odd_ones_never_crash():
    env = WebShop()
    for query in ("the and of", "qqqq", "...", "é \0 名称 \ud800", "[x]", "shoes " * 2000, "x" * 10_000, "_", "\u0301"):
        env.reset(0)
        observation, _, _, _, info = env.step(f"search[{query}]")
        assert info["valid"] and env.page.name == "results" and (len(env.page.found) > 0) == ("shoes" in query)
        assert env.page.found or env.legal_actions() == ["click[back to search]"]
        assert f"(Total results: {len(env.page.found)})" in observation


def test_the_action_budget_truncates_and_a_last_action_buys():
    env = WebShop()
    env.reset(0)
    env.step("search[shoes for men]")
    ends = [env.step("click[next >]" if turn % 2 else "click[< prev]")[3] for turn in range(1, 9)]  # 9 with the search
    assert ends == [False] * 7 + [True] and env.actions_left == 0
    seed = next(seed for seed in range(80) if not env.reset(seed) or len(env.goal.options) == 2)
    env.reset(seed)
    for action in env.solve()[:2]:
        env.step(action)
    env.actions_left = 1
    assert env.solve() == ["click[buy now]"]
    env.actions_left = 2
    assert len(env.solve()) == 2 and env.solve()[-1] == "click[buy now]"


def test_strict_pays_only_for_a_perfect_purchase():
    paid = {}
    for strict in (False, True):
        env = WebShop(strict=strict)
        env.reset(next(seed for seed in range(80) if not env.reset(seed) or env.goal.options))
        options = len(env.goal.options)
        for actions in (env.solve(), [*env.solve()[:2], "click[buy now]"]):
            env.page, env.actions_left = Page(), 9
            paid.setdefault(strict, []).append([env.step(action) for action in actions][-1])
    expected = 3 / (3 + options)  # 2 attributes and the price, none of the options
    assert [step[1] for step in paid[False]] == [1, pytest.approx(expected)]
    assert [step[1] for step in paid[True]] == [1, 0]
    assert [step[4]["score"] for step in paid[True]] == [step[4]["score"] for step in paid[False]]
    assert [step[4]["success"] for step in paid[True]] == [True, False]


def test_short_pages_show_fewer_results_and_shorter_titles_and_can_still_be_played():
    env, whole = WebShop(results_per_page=3, title_words=4), WebShop()
    for seed in range(80):
        env.reset(seed), whole.reset(seed)
        observation, full = (game.step(f"search[{env.goal.text}]")[0] for game in (env, whole))
        assert sum(text.startswith("$") for text in observation.split(" [SEP] ")) == 3
        assert len(observation) < len(full) / 2
        env.reset(seed)
        assert [env.step(action) for action in env.solve()][-1][4]["success"]
    for option, value in (("results_per_page", 0), ("title_words", -1)):
        with pytest.raises(ValueError, match=str(value)):
            WebShop(**{option: value})


def test_the_oracle_finds_its_way_from_any_page():
    env, rng = WebShop(), random.Random(0)
    for seed in range(80):
        env.reset(seed)
        for _ in range(rng.randrange(4)):
            legal = [action for action in env.legal_actions() if action != "click[buy now]"]
            env.step(rng.choice(legal))
        before = env.page, env.actions_left
        plan = env.solve()
        assert (env.page, env.actions_left) == before and plan[0] in env.best_actions()
        env.actions_left = 12
        last = [env.step(action) for action in env.solve(choose=rng.choice)][-1]
        assert last[4]["success"]


def test_every_legal_action_is_valid_and_every_valid_click_is_legal():
    env, rng = WebShop(), random.Random(1)
    for seed in range(150):
        env.reset(seed)
        over = False
        while not over:
            page, left = env.page, env.actions_left
            for action in env.legal_actions():
                env.page, env.actions_left = page, left
                assert env.step(action)[4]["valid"]
            env.page, env.actions_left = page, left
            _, _, terminated, truncated, _ = env.step(rng.choice(env.legal_actions()))
            over = terminated or truncated


def test_no_string_whatever_raises_and_returns_stay_finite():
    env, rng = WebShop(), random.Random(2)
    words = ["search", "click", "[", "]", "[", "]", "buy now", "< prev", "next >", "\0", "é", "İ", "\ud800", "|", " "]
    actions = 0
    env.reset(0)
    while actions < 20_000:
        noise = "".join(map(chr, rng.choices(range(0x250), k=rng.randint(0, 12))))
        legal = env.legal_actions() or [""]
        mix = "".join(rng.choices(words, k=5))
        action = rng.choice((noise, mix, f"search[{noise}]", f"click[{noise}]", *legal[-3:]))
        _, reward, terminated, truncated, _ = env.step(action)
        assert math.isfinite(reward) and 0 <= reward <= 1 and not (terminated and truncated)
        actions += 1
        if terminated or truncated:
            assert truncated or not any(env.step(after)[4]["valid"] for after in (noise, "click[buy now]"))
            env.reset(actions)


def trace(data=None):
    """Goals, searches, pages and rewards of 12 episodes, as one string."""
    env, lines = WebShop(data), []
    for seed in [*range(6), *range(1_000_000, 1_000_006)]:
        rng = random.Random(seed)
        lines.append(env.reset(seed, seed % 3)[0])
        lines += [str(env.step(action)) for action in env.solve()[:2]]
        lines += [str(env.step(rng.choice(env.legal_actions()))) for _ in range(2)]
    return "\n".join(lines)


@pytest.mark.slow
def test_the_same_seed_is_the_same_episode_in_any_process_and_after_other_games():
    def elsewhere(hash_seed):
        path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
        return subprocess.run(
            [sys.executable, "-c", "import test_webshop; print(test_webshop.trace())"], text=True, encoding="utf-8",
            env=os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": path, "PYTHONIOENCODING": "utf-8"},
            stdout=subprocess.PIPE, check=True,
        ).stdout  # fmt: skip

    alone = trace()
    other = make_env("sokoban")
    other.reset(0), other.step("Up")
    random.seed(1), np.random.seed(1)
    assert elsewhere("0") == elsewhere("1") == trace() + "\n" == alone + "\n"


def test_the_shop_is_built_once_per_process():
    assert make_env("webshop").goals is WebShop(results_per_page=2).goals


def test_a_step_costs_a_small_part_of_building_the_shop():
    start = time.process_time()
    webshop.open_shop.__wrapped__(None)
    build, env = time.process_time() - start, WebShop()
    start, steps = time.process_time(), 0
    for seed in range(50):
        env.reset(seed)
        steps += len([env.step(action) for action in env.solve()])
    assert (time.process_time() - start) / steps < build / 10


def test_words_are_those_of_lucenes_english_analysis():
    for text, words in (
        ("The men's T-shirts, with long sleeve", ["men", "t", "shirts", "long", "sleeve"]),
        ("don't can’t", ["don't", "can’t"]),
        ("1,000.5 x 2 v1.5 3.a", ["1,000.5", "x", "2", "v1.5", "3", "a"][:-1]),  # the last is a stop word
        ("Material:Wood U.S.A. foo_bar _ __", ["material:wood", "u.s.a", "foo_bar"]),
        ("a/c b-d e|f", ["c", "b", "d", "e", "f"]),
        ("名称2 m² ½", ["名", "称", "2", "m"]),
        ("\u2605Soft \u2764\ufe0fWarm\u00ae", ["\u2605", "soft", "\u2764\ufe0f", "warm", "\u00ae"]),
    ):
        assert split_words(text) == words
    assert len(catalogue.STOPS) == 33
    assert catalogue.STEMMER.stemWords(["washing", "easily", "generously"]) == ["wash", "easili", "gener"]


def test_lengths_are_stored_in_one_byte_as_lucene_stores_them():
    # 24 + 17 = 41 loses its last bit: 17 = 10001₂ → 10000₂; 24 + 100 = 124: 1100100₂ → 1100000₂ = 96
    for length, stored in ((0, 0), (23, 23), (39, 39), (40, 40), (41, 40), (42, 42), (124, 120), (300, 280)):
        assert stored_length(length) == stored


def test_bm25_by_hand_and_ties_by_asin():
    index = SearchIndex({"B2": "red shoe", "B1": "red shoe", "B3": "red red hat wool", "B4": "blue"})
    assert index.search("shoe") == ["B1", "B2"] and index.search("green") == []
    # lengths 2, 2, 4, 1, mean 9 / 4; red is in 3 of 4: idf = ln(1 + 1.5 / 3.5)
    # B3: tf 2, 2 / (2 + 0.9 · (0.6 + 0.4 · 4 / 2.25)) = 0.6289; B1: 1 / (1 + 0.9 · (0.6 + 0.4 · 2 / 2.25)) = 0.5376
    rows, gains = index.postings["red"]
    assert [index.asins[row] for row in rows] == ["B1", "B2", "B3"]
    assert gains == pytest.approx(math.log(1 + 1.5 / 3.5) * np.array([0.5376, 0.5376, 0.6289]), abs=1e-4)
    # twice the word, twice its weight: wool (idf ln(1 + 3.5 / 1.5)) beats blue only when asked for more often
    assert index.search("wool blue")[0] == "B4" and index.search("wool wool blue")[0] == "B3"


def record(asin, **changes):
    return {"asin": asin, "name": "Elm Shirt", "query": "shirts", "product_category": "A › B"} | changes


def write(folder, items, details, nouns=None):
    """A folder in the official layout; text is written as it is."""
    for name, content in (("items_shuffle_1000.json", items), ("items_ins_v2_1000.json", details)):
        if content is not None:
            (folder / name).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    if nouns is not None:
        (folder / "webshop_1000.jsonl").write_text(nouns, encoding="utf-8")
    return folder


WANTED = {"attributes": ["warm"], "instruction": "Find me a shirt", "instruction_attributes": ["warm"]}


def test_missing_optional_fields_are_filled_in(tmp_path):
    items = [record("B1"), record("B2", pricing="$1,299.5 to $1,300.5", small_description="One text.", extra=1)]
    items += [record("B3", pricing=None, small_description=None, customization_options="", full_description=None)]
    items += [record("B4", name="", customization_options={"Size": [{"value": " X/L "}], "Color": None, "Fit": []})]
    env = make_env("webshop", data=write(tmp_path, [*items, record("B1", name="again")], {"B1": WANTED, "B2": {}}))
    first, second, third, fourth = env.products.values()
    assert (first.price, first.price_tag, first.options, first.bullets) == (100, "$100.0", {}, ())
    assert (second.price, second.price_tag, second.bullets) == (1300, "$1299.5 to $1300.5", ("One text.",))
    assert third.description == "" and third.attributes == () and third.instruction is None
    assert fourth.options == {"size": ("x | l",)} and fourth.num_nouns == 0 and env.products["B1"].title == "Elm Shirt"
    assert [goal.asin for goal in env.goals] == ["B1"]
    for seed in (0, 1_000_000):
        env.reset(seed)
        for asin in ("b1", "b2", "b3"):
            env.page, env.actions_left = Page(), 9
            env.step("search[shirt]")
            for action in (f"click[{asin}]", "click[description]", "click[< prev]", "click[features]", "click[< prev]"):
                assert env.step(action)[4]["valid"]
            assert math.isfinite(env.step("click[buy now]")[1])


def test_noun_sets_come_from_the_jsonl_file_and_else_from_the_title(tmp_path):
    nouns = '{"asin": "B1", "nouns": ["shirt"], "n_nouns": 2}\n{"asin": "B9", "nouns": []}'
    items = [record("B1"), record("B2", name="The red Shirt for shirt lovers")]
    env = WebShop(write(tmp_path, items, {"B1": WANTED}, nouns))
    assert (env.products["B1"].nouns, env.products["B1"].num_nouns) == ({"shirt"}, 2)
    assert env.products["B2"].nouns == {"red", "shirt", "lovers"} and env.products["B2"].num_nouns == 4


ITEMS, DETAILS = "items_shuffle_1000", "items_ins_v2_1000"
BAD = {
    "no items": (None, {"B1": WANTED}, None, ITEMS),
    "no details": ([record("B1")], None, None, DETAILS),
    "empty file": ("", {"B1": WANTED}, None, ITEMS),
    "truncated": (json.dumps([record("B1")])[:-5], {"B1": WANTED}, None, ITEMS),
    "truncated details": ([record("B1")], '{"B1": {"instr', None, DETAILS),
    "empty list": ([], {"B1": WANTED}, None, ITEMS),
    "not a list": ({"B1": record("B1")}, {"B1": WANTED}, None, ITEMS),
    "details not a dict": ([record("B1")], [WANTED], None, DETAILS),
    "item not a dict": ([record("B1"), 5], {"B1": WANTED}, None, ITEMS, "asin"),
    "no asin": ([{"name": "x"}], {"B1": WANTED}, None, ITEMS, "asin"),
    "asin a number": ([record(5)], {"B1": WANTED}, None, ITEMS, "asin"),
    "no name": ([{"asin": "B1", "query": "", "product_category": ""}], {"B1": WANTED}, None, ITEMS, "name"),
    "name a list": ([record("B1", name=["x"])], {"B1": WANTED}, None, ITEMS, "name"),
    "no query": ([record("B1", query=None)], {"B1": WANTED}, None, ITEMS, "query"),
    "no category": ([record("B1", product_category=None)], {"B1": WANTED}, None, ITEMS, "product_category"),
    "price a number": ([record("B1", pricing=5)], {"B1": WANTED}, None, ITEMS, "pricing"),
    "price without one": ([record("B1", pricing="cheap")], {"B1": WANTED}, None, ITEMS, "pricing"),
    "bullets": ([record("B1", small_description=[1])], {"B1": WANTED}, None, ITEMS, "small_description"),
    "description": ([record("B1", full_description=[])], {"B1": WANTED}, None, ITEMS, "full_description"),
    "options": ([record("B1", customization_options=[1])], {"B1": WANTED}, None, ITEMS, "customization_options"),
    "group": ([record("B1", customization_options={"s": "x"})], {"B1": WANTED}, None, ITEMS, "customization_options"),
    "value": ([record("B1", customization_options={"s": [{}]})], {"B1": WANTED}, None, ITEMS, "value"),
    "detail a list": ([record("B1")], {"B1": []}, None, DETAILS, "B1"),
    "attributes": ([record("B1")], {"B1": WANTED | {"attributes": "warm"}}, None, DETAILS, "attributes"),
    "instruction": ([record("B1")], {"B1": WANTED | {"instruction": 5}}, None, DETAILS, "instruction"),
    "no wanted": ([record("B1")], {"B1": {"instruction": "x"}}, None, DETAILS, "instruction_attributes"),
    "no goal": ([record("B1")], {"B1": {"attributes": []}}, None, "", "instruction"),
    "nouns": ([record("B1")], {"B1": WANTED}, '{"asin": "B1", "nouns": [5]}', "webshop_1000.jsonl: line 1", "nouns"),
    "no nouns": ([record("B1")], {"B1": WANTED}, '{"asin": "B1"}', "webshop_1000.jsonl: line 1", "nouns"),
    "nouns cut": ([record("B1")], {"B1": WANTED}, '{"asin": "B1", "no', "webshop_1000.jsonl: line 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_data_is_one_line_that_names_file_and_field(case, tmp_path):
    items, details, nouns, *named = BAD[case]
    with pytest.raises(ValueError) as error:
        WebShop(write(tmp_path, items, details, nouns))
    assert "\n" not in str(error.value) and all(name in str(error.value) for name in named)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere"):
        WebShop(tmp_path / "nowhere")


def test_the_built_in_shop_can_be_won_and_not_by_chance():
    env, rng, rewards, wins = WebShop(), random.Random(0), [], 0
    assert len(env.products) == 200 and len({item.query for item in env.products.values()}) == 40
    for seed in range(80):
        env.reset(seed)
        plan = env.solve()
        assert len(plan) <= 5 and [env.step(action) for action in plan][-1][4]["success"]
    for seed in range(300):
        env.reset(seed)
        over = False
        while not over:
            _, reward, terminated, truncated, info = env.step(rng.choice(env.legal_actions()))
            over = terminated or truncated
        rewards.append(reward)
        wins += info["success"]
    assert wins <= 6 and 0.05 < np.mean(rewards) < 0.2


@official
def test_the_thousand_products_give_6910_goals():
    env = WebShop(OFFICIAL)
    assert len(env.products) == 1000 and len(env.goals) == 6910
    assert [len(env.parts[name]) for name in ("test", "validation", "train")] == [500, 1000, 5410]


@official
def test_the_search_ranks_as_the_real_engine_does():
    assert WebShop(OFFICIAL).index.search("machine wash men's t-shirts with long sleeve")[:10] == GOLDEN.split()


@official
def test_buying_the_goals_product_with_its_options_scores_one_on_600_goals():
    env = WebShop(OFFICIAL)
    goals = random.Random(0).sample(env.goals, 600)
    scores = [purchase_score(env.products[g.asin], g.options, g, env.products[g.asin]) for g in goals]
    assert np.mean(np.array(scores) == 1) >= 0.99
    found = np.mean([goal.asin in env.index.search(goal.text)[:10] for goal in goals])
    assert found == pytest.approx(0.91, abs=0.03)


@official
def test_the_oracle_buys_the_official_goals_in_two_to_nine_steps():
    env, wins, lengths = WebShop(OFFICIAL), [], []
    for seed in range(200):
        env.reset(seed)
        plan = env.solve()
        wins.append([env.step(action) for action in plan][-1][4]["success"])
        lengths.append(len(plan))
    assert np.mean(wins) >= 0.99 and min(lengths) >= 3 and max(lengths) <= 9 and np.mean(lengths) < 6


@official
def test_the_official_pages_are_deterministic_and_no_file_of_theirs_is_in_the_repository():
    assert trace(OFFICIAL) == trace(OFFICIAL)
    names = {path.name for path in OFFICIAL.iterdir()} - {"README.md"}
    repository = Path(__file__).parents[1]
    assert not [path for name in names for path in repository.rglob(name)]
