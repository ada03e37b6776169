"""The goods of the WebShop game: official files or a small shop made here, and the search over them.

`load_products(folder)` reads the official layout (princeton-nlp/WebShop): items_shuffle_1000*.json,
items_ins_v2_1000*.json and the noun sets in webshop_*.jsonl. A product without a noun set there, or a folder without
that file, takes every title word but the stop words for a noun. `load_products(None)` is a shop of 200 products of
ours in the same layout.

The search is BM25 over Lucene's English analysis. It is not `bm25s`: that scores with exact document lengths, Lucene
with lengths cut to one byte, and over the official products one result position in eleven differs.

Differs from the original: a price range counts as its mean; ratings and reviews are left out.
"""

import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import Stemmer

ITEMS, DETAILS = "items_shuffle_1000*.json", "items_ins_v2_1000*.json"
K1, B, BEST = 0.9, 0.4, 50  # BM25, and how many results a search returns
STOP_WORDS = (  # Lucene's 33
    "a an and are as at be but by for if in into is it no not of on or such that the their then there these they "
    "this to was will with"
)
IDEOGRAPH = "\u3041-\u309f\u3400-\u9fff\uf900-\ufaff"  # Chinese characters and hiragana
EMOJI = (  # Unicode's Extended_Pictographic, the blocks in use
    "\u00a9\u00ae\u203c\u2049\u2122\u2139\u2194-\u2199\u21a9\u21aa\u231a\u231b\u2328\u23cf\u23e9-\u23f3"
    "\u23f8-\u23fa\u24c2\u25aa\u25ab\u25b6\u25c0\u25fb-\u25fe\u2600-\u2605\u2607-\u2612\u2614-\u2685"
    "\u2690-\u2705\u2708-\u2712\u2714\u2716\u271d\u2721\u2728\u2733\u2734\u2744\u2747\u274c\u274e\u2753-\u2755"
    "\u2757\u2763-\u2767\u2795-\u2797\u27a1\u27b0\u27bf\u2934\u2935\u2b05-\u2b07\u2b1b\u2b1c\u2b50\u2b55\u3030"
    "\u303d\u3297\u3299"
    "\U0001f000-\U0001faff"
)
RUN = rf"[^\W{IDEOGRAPH}¹²³¼-¾]+"
# Lucene's standard tokenizer: an emoji, an ideograph, or a run of letters, digits and _, which some punctuation joins
# between two letters or two digits.
WORD = re.compile(
    rf"[{EMOJI}]\ufe0f?(?:\u200d[{EMOJI}]\ufe0f?)*|[{IDEOGRAPH}]|"
    rf"{RUN}(?:(?<=[^\W\d_])[.:'‘’·：](?=[^\W\d_]){RUN}|(?<=\d)[.,;'‘’，；](?=\d){RUN})*"
)
STOPS = frozenset(STOP_WORDS.split())
STEMMER = Stemmer.Stemmer("porter")  # the original Porter algorithm, Lucene's too


@dataclass(frozen=True)
class Product:
    """One page of the shop, and what the goals and the reward need to know of it."""

    asin: str
    title: str
    description: str
    bullets: tuple[str, ...]
    price: float  # dollars; the mean of a range
    price_tag: str
    options: dict[str, tuple[str, ...]]  # group → values, lower case
    query: str  # the search that found it in the original crawl
    path: frozenset[str]  # parts of the category path
    attributes: tuple[str, ...]
    instruction: str | None
    wanted: tuple[str, ...]  # the attributes the instruction names
    nouns: frozenset[str]  # of the title
    num_nouns: int  # repeats counted, as the original does


def split_words(text: str) -> list[str]:
    """Lucene's English analysis without the stems: words, no possessive 's, no stop words."""
    words = (re.sub("['’]s$", "", word) for word in WORD.findall(text.lower()))
    return [word for word in words if word not in STOPS and word.strip("_")]


def stored_length(length: int) -> int:
    """A document's length as Lucene keeps it in one byte: exact to 40, then four significant bits above 24."""
    shift = max((length - 24).bit_length() - 4, 0) if length >= 24 else 0
    return 24 + ((length - 24) >> shift << shift) if shift else length


class SearchIndex:
    """BM25 as Lucene computes it; ties go by ASIN.

        score = Σ_{t ∈ query} idf_t · tf / (tf + k₁ (1 - b + b · length / mean length))
        idf_t = ln(1 + (N - n + ½) / (n + ½)),   n of N documents have t

    A term counts as often as the query has it. The lengths, but not their mean, are Lucene's one-byte ones.
    """

    def __init__(self, texts: dict[str, str]):
        self.asins = sorted(texts)
        documents = [Counter(STEMMER.stemWords(split_words(texts[asin]))) for asin in self.asins]
        mean = max(sum(document.total() for document in documents) / len(documents), 1)
        postings = {}
        for row, document in enumerate(documents):
            norm = K1 * (1 - B + B * stored_length(document.total()) / mean)
            for term, count in document.items():
                postings.setdefault(term, []).append((row, count / (count + norm)))
        self.postings = {}
        for term, entries in postings.items():
            idf = np.log(1 + (len(texts) - len(entries) + 0.5) / (len(entries) + 0.5))
            self.postings[term] = np.array([row for row, _ in entries]), idf * np.array([tf for _, tf in entries])

    def search(self, query: str) -> list[str]:
        """ASINs of the best 50, best first."""
        scores = np.zeros(len(self.asins))
        for term, count in Counter(STEMMER.stemWords(split_words(query))).items():
            rows, gains = self.postings.get(term, ([], 0.0))
            scores[rows] += count * gains
        scores = scores.astype(np.float32)  # Lucene's precision, so equal documents tie
        return [self.asins[row] for row in np.argsort(-scores, kind="stable")[:BEST] if scores[row] > 0]


def load_products(folder: str | None) -> tuple[dict[str, Product], SearchIndex]:
    """Products by ASIN and the search over them: of a folder in the official layout, or of the built-in shop.

    Raises:
        ValueError: a file is missing, truncated or empty, or a field is missing or of the wrong type; names both.
    """
    items, details, nouns, names = _read_folder(Path(folder)) if folder else (*make_records(), ("built-in shop",) * 2)
    products = {}
    for number, item in enumerate(items):
        where = f"{names[0]}: product {number}"
        asin = _field(item, "asin", str, where)
        detail = _field(details, asin, dict, names[1], {})
        parsed = _parse_product(item, detail, nouns.get(asin), where, f"{names[1]}: product {asin}")
        products.setdefault(asin, parsed)  # the first of two with one ASIN, as in the original
    return products, SearchIndex({asin: _search_text(item) for asin, item in products.items()})


def _search_text(item: Product) -> str:
    options = ", and ".join(f"{name}: {', '.join(values)}" for name, values in item.options.items())
    return " ".join([item.title, item.description, *item.bullets[:1], options]).lower()


def _parse_product(item: dict, detail: dict, nouns: tuple | None, where: str, detail_where: str) -> Product:
    title = _field(item, "name", str, where)
    prices = _parse_prices(item, where)
    one_text = isinstance(bullets := item.get("small_description"), str)
    instruction = _field(detail, "instruction", str, detail_where, "")
    words, num_nouns = nouns or (split_words(title), len(split_words(title)))
    return Product(
        item["asin"], title, _field(item, "full_description", str, where, ""),
        (bullets,) if one_text else _strings(item, "small_description", where, []),
        sum(prices) / len(prices), " to ".join(f"${price}" for price in prices), _parse_options(item, where),
        _field(item, "query", str, where).lower().strip(),
        frozenset(part.strip() for part in _field(item, "product_category", str, where).split("›")),
        _strings(detail, "attributes", detail_where, []), instruction or None,
        _strings(detail, "instruction_attributes", detail_where, None if instruction else []),
        frozenset(words), num_nouns,
    )  # fmt: skip


def _parse_prices(item: dict, where: str) -> list[float]:
    """One price or the two ends of a range, dollars; 100 where there is none, as in the original."""
    text = _field(item, "pricing", str, where, "$100.0")
    prices = re.findall(r"\$\s*(\d[\d,]*(?:\.\d+)?)", text)[:2]
    if not prices:
        raise ValueError(f"{where}: field 'pricing' has no price: {text!r:.60}")
    return [float(price.replace(",", "")) for price in prices]


def _parse_options(item: dict, where: str) -> dict[str, tuple[str, ...]]:
    options, groups = {}, _field(item, "customization_options", dict, where, {})
    for group in groups:
        inside = f"{where}, customization_options"
        contents = _field(groups, group, list, inside, [])
        values = (_field(content, "value", str, f"{inside}, {group}") for content in contents)
        if contents:
            options[group.lower()] = tuple(value.strip().replace("/", " | ").lower() for value in values)
    return options


def _field(record: dict, name: str, kinds: type | tuple, where: str, default=None):
    """record[name], checked; None or "" is the default, and without a default a missing field is an error."""
    value = record.get(name) if isinstance(record, dict) else record
    if default is not None and value in (None, ""):
        return default
    if not isinstance(value, kinds) or not isinstance(record, dict):
        raise ValueError(f"{where}: field {name!r} is missing or of the wrong type: {value!r:.60}")
    return value


def _strings(record: dict, name: str, where: str, default: list | None = None) -> tuple[str, ...]:
    values = _field(record, name, list, where, default)
    if not all(isinstance(value, str) for value in values):
        raise ValueError(f"{where}: field {name!r} must be a list of strings: {values!r:.60}")
    return tuple(values)


def _read_folder(folder: Path) -> tuple[list, dict, dict, tuple[str, str]]:
    """Items, details by ASIN, noun sets with their sizes by ASIN where given, and the names of the first two files."""
    paths = []
    for pattern in (ITEMS, DETAILS):
        if not (found := sorted(folder.glob(pattern))):
            raise ValueError(f"{folder}: there is no file {pattern}")
        paths.append(found[0])
    items, details = (_read_json(path, path.read_bytes(), kind) for path, kind in zip(paths, (list, dict), strict=True))
    nouns = {}
    for path in sorted(folder.glob("webshop_*.jsonl")):
        for number, line in enumerate(path.read_bytes().splitlines(), 1):
            where = f"{path}: line {number}"
            record = _read_json(where, line, dict)
            words = _strings(record, "nouns", where)
            nouns[_field(record, "asin", str, where)] = words, _field(record, "n_nouns", int, where, len(words))
    return items, details, nouns, (str(paths[0]), str(paths[1]))


def _read_json(where: str | Path, text: bytes, kind: type):
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not readable as JSON: {error}") from None
    if not isinstance(value, kind) or not value:
        raise ValueError(f"{where}: must be a {kind.__name__} and not empty")
    return value


BRANDS = "Alder, Birch, Cedar, Dover, Elm, Fable, Grove, Harbor, Iris, Juniper, Kestrel, Linden, Maple, Nova, Opal"
DEPARTMENTS = (  # category, path, kinds of product, attributes, for whom, option groups
    ("fashion", "Clothing", "t-shirts, hoodies, jackets, jeans, running shoes, hiking shoes, swim shorts, wool socks",
     "machine wash, slim fit, quick drying, long lasting, soft lining, water resistant, elastic waist, hand wash",
     "men, women, boys, girls", {"color": "black, navy blue, dark green, red, white", "size": "small, medium, large"}),
    ("beauty", "Beauty & Care", "hair brushes, face creams, shampoos, lip balms, hand creams, hair oils, soaps, combs",
     "fragrance free, cruelty free, easy to use, sensitive skin, tea tree, natural ingredients, travel size, dry skin",
     "women, men, babies, teenagers", {"scent": "lavender, lemon, rose, mint", "size": "2 ounce, 6 ounce, 12 ounce"}),
    ("electronics", "Electronics", "phone cases, phone chargers, headphones, camera bags, cables, clocks, fans, radios",
     "fast charging, easy to install, noise cancelling, light weight, high speed, gold plated, wireless, hands free",
     "travel, offices, kitchens, gamers", {"color": "black, silver, blue, pink", "style": "basic, plus, twin pack"}),
    ("garden", "Home & Garden", "coffee tables, side tables, desk chairs, garden chairs, pillows, rugs, lamps, shelves",
     "solid wood, easy to clean, easy to assemble, space saving, machine washable, eco friendly, non slip, metal legs",
     "bedrooms, balconies, offices, hallways", {"color": "walnut, white, gray, brown", "size": "24 inch, 36 inch"}),
    ("grocery", "Grocery", "green teas, black teas, nut bars, fruit bars, crackers, dried fruits, spices, coffees",
     "gluten free, sugar free, low sodium, non gmo, high protein, dairy free, individually wrapped, ready to eat",
     "breakfasts, lunches, hikers, parties", {"flavor": "plain, honey, ginger, berry", "size": "small box, large box"}),
)  # fmt: skip


def make_records(count: int = 200, seed: int = 0) -> tuple[list[dict], dict[str, dict], dict[str, tuple]]:
    """Ours: items, details and noun sets of the built-in shop, in the official layout."""
    rng, items, details, nouns = np.random.default_rng(seed), [], {}, {}

    def draw(words: str, most: int) -> list[str]:
        words = words.split(", ")
        return [words[i] for i in sorted(rng.permutation(len(words))[:most])]

    for number in range(count):
        category, department, kinds, qualities, users, groups = DEPARTMENTS[number % 5]
        kind, user = kinds.split(", ")[number // 5 % 8], draw(users, 1)[0]
        brand, attributes = draw(BRANDS, 1)[0], draw(qualities, 3)
        asin = "B0" + "".join(rng.choice(list(letters)) for letters in ("BDFGKLMNPRSTVZ", "AEIOU") * 3)
        options = {name: draw(values, int(rng.integers(2, 5))) for name, values in groups.items() if rng.random() < 0.8}
        items.append({
            "asin": asin, "name": f"{brand} {kind} for {user}, {attributes[0]}, {attributes[1]}".title(),
            "category": category, "query": kind, "product_category": f"{department} › {user} › {kind}".title(),
            "pricing": f"${rng.integers(500, 9000) / 100}",
            "small_description": [f"These {kind} are made for {user}.", *(f"You get {a}." for a in attributes)],
            "full_description": f"{brand} {kind}: {attributes[2]}, made to please {user} every day.",
            "customization_options": {name: [{"value": v} for v in values] for name, values in options.items()},
        })  # fmt: skip
        asked = draw(", ".join(attributes), 2)
        details[asin] = {"attributes": attributes, "instruction_attributes": asked,
                         "instruction": f"Find me {kind} for {user} with {', '.join(asked)}"}  # fmt: skip
        words = [brand.lower(), *kind.split(), *user.split()]
        nouns[asin] = words, len(words)
    return items, details, nouns
