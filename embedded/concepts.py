"""Which drawing of which set shows which concept.

A concept is a Unicode emoji, named by its hexcode without the presentation selector (FE0F). Some sets say which
character each icon is; the others only name their icons, and a vocabulary of names, slugs and aliases finds it.
"""

import json
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from embedded.icons import CACHE, IconSet, fetch_pinned, read_iconify, read_openmoji

GROUPS = {3: "animals-nature", 4: "food-drink", 5: "travel-places", 6: "activities", 7: "objects"}
DESIGNS = ("noto", "noto-v1", "twemoji", "emojione", "emojione-v1")  # train, held_out and test are drawn from these
MIN_DESIGNS = 4  # of the five, for a concept to become a class

# fxemoji names its icons freely; these are the ones that the vocabulary misses or gets wrong ("": no object at all)
FXEMOJI_NAMES = {
    "dog": "1F436",
    "dogside": "1F415",
    "cat": "1F431",
    "catside": "1F408",
    "tiger": "1F42F",
    "tigerside": "1F405",
    "leopardside": "1F406",
    "pig": "1F437",
    "pigside": "1F416",
    "pigsnout": "1F43D",
    "mouse": "1F42D",
    "mouseside": "1F401",
    "hampster": "1F439",
    "bunny": "1F430",
    "bunnyside": "1F407",
    "frontfacingchick": "1F425",
    "dragonhead": "1F432",
    "dragonside": "1F409",
    "spurtingwhale": "1F433",
    "evergreen": "1F332",
    "fallingleaf": "1F342",
    "leaffluttering": "1F343",
    "chilipepper": "1F336",
    "acorn": "1F330",
    "fishcakeswirl": "1F365",
    "forkknife": "1F37D",
    "europeafricaglobe": "1F30D",
    "americasglobe": "1F30E",
    "asiaaustraliaglobe": "1F30F",
    "meridianglobe": "1F310",
    "silhouetteohjapan": "1F5FE",
    "snowmountains": "1F3D4",
    "beachumbrella": "1F3D6",
    "toykotower": "1F5FC",
    "highspeedtrainbulletnose": "1F685",
    "waningbibbousmoon": "1F316",
    "manltepiececlock": "1F570",
    "whitesun": "2600",
    "sunraincloud": "1F326",
    "stormcloud": "1F329",
    "bolt": "26A1",
    "wave": "1F30A",
    "umbrella": "1F302",
    "star": "1F31F",
    "whitemediumstar": "2B50",
    "confetti": "1F38A",
    "present": "1F381",
    "reminder": "1F397",
    "tennisball": "1F3BE",
    "mansshirt": "1F455",
    "womansshirt": "1F45A",
    "makeupbag": "1F45D",
    "pinkwallet": "1F45B",
    "mensshoe": "1F45E",
    "mensrunner": "1F45F",
    "heels": "1F460",
    "sandals": "1F461",
    "speakercancellation": "1F507",
    "speakeronesoundwave": "1F509",
    "speaker3soundwaves": "1F50A",
    "bellcancellation": "1F515",
    "studiomic": "1F399",
    "controlknob": "1F39B",
    "cellphone": "1F4F1",
    "phonerightarrowleft": "1F4F2",
    "telephonereceiver2": "1F4DE",
    "handheldvideocamera": "1F4F9",
    "videocasette": "1F4FC",
    "leftmagnifyingglass": "1F50D",
    "rightmagnifyingglass": "1F50E",
    "notebookdecorative": "1F4D4",
    "bookmarktab": "1F4D1",
    "banknoteyen": "1F4B4",
    "banknotedollar": "1F4B5",
    "banknoteeuro": "1F4B6",
    "banknotepound": "1F4B7",
    "chartupwardstrendyen": "1F4B9",
    "envelopedownarrowabove": "1F4E9",
    "outbox": "1F4E4",
    "closedmailboxraised": "1F4EB",
    "closedmailboxlowered": "1F4EA",
    "openmailboxraised": "1F4EC",
    "openmailboxlowered": "1F4ED",
    "ballottboxwithballott": "1F5F3",
    "lowerleftpen": "1F58A",
    "chartupwardstrend": "1F4C8",
    "chartdownwardstrend": "1F4C9",
    "lockandkey": "1F510",
    "bouquetofflowers": "1F490",
    "opticaldiscicon": "1F4BF",
    "printericon": "1F5A8",
    "faxicon": "1F4E0",
    "softshellfloppy": "1F4BE",
    "openfolder": "1F4C2",
    "folder": "1F4C1",
    "sunglasses": "",
}

# drawings whose name says one thing and whose picture another; found by looking at every drawing of every class
WRONG = {
    ("noto-v1", "cricket"),  # the game, not the insect
    ("emojione", "cricket"),  # the game
    ("emojione-v1", "keyboard"),  # a piano keyboard
    ("emojione-v1", "shield"),  # a road sign
    ("fxemoji", "keyboard"),  # a piano keyboard
    ("fxemoji", "fog"),  # white on white, too faint to see
    ("fxemoji", "gamedie"),  # a domino
    ("fxemoji", "hourglass"),  # the same picture as hourglassflowingsand
    ("fxemoji", "tramcar"),  # a black box: its drawing relies on what the package has lost
    ("streamline-emojis", "turkey"),  # the flag
    ("streamline-emojis", "champagne-glass-1"),  # one glass, where the class is two that clink
    ("streamline-emojis", "champagne-glass-2"),
}


@dataclass(frozen=True)
class Concept:
    """One class of the benchmark."""

    hexcode: str
    name: str
    group: str


def plain(hexcode: str) -> str:
    """The hexcode in upper case without presentation selectors.

    >>> plain("2744-fe0f")
    '2744'
    """
    return "-".join(part for part in hexcode.upper().split("-") if part != "FE0F")


def slug(name: str) -> str:
    """Lower-case words joined by dashes.

    >>> slug("Woman’s Boot"), slug("piñata"), slug("flag_in_hole")
    ('womans-boot', 'pinata', 'flag-in-hole')
    """
    ascii_only = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "-", ascii_only.lower().replace("'", "")).strip("-")


def read_concepts(emojibase: Path) -> dict[str, Concept]:
    """Hexcode -> concept, for every object of the five groups; clock faces are left out."""
    rows = json.loads((emojibase / "en" / "data.json").read_text("utf-8"))
    clock_face = re.compile(r"(o’clock|-thirty)$")
    return {
        plain(row["hexcode"]): Concept(plain(row["hexcode"]), row["label"], GROUPS[row["group"]])
        for row in rows
        if row.get("group") in GROUPS and not clock_face.search(row["label"])
    }


def read_sets(cache: Path = CACHE) -> dict[str, IconSet]:
    """Every icon set of the benchmark, by the name used in `source`."""
    keys = (
        *DESIGNS,
        "fxemoji",
        "fluent-emoji",
        "fluent-emoji-flat",
        "fluent-emoji-high-contrast",
        "streamline-emojis",
    )
    sets = {key: read_iconify(fetch_pinned(key, cache)) for key in keys}
    for style in ("color", "black"):
        sets[f"openmoji-{style}"] = read_openmoji(fetch_pinned("openmoji", cache), style)
    return sets


def vocabulary(layers: Iterable[Iterable[tuple[str, str]]]) -> dict[str, str]:
    """Name -> hexcode from layers of (name, hexcode), most trusted first.

    A name that an earlier layer has is settled; a name that one layer gives to two hexcodes is left out of that layer.
    """
    known: dict[str, str] = {}
    for layer in layers:
        found = defaultdict(set)
        for name, hexcode in layer:
            found[name].add(hexcode)
        known = {name: min(codes) for name, codes in found.items() if len(codes) == 1} | known
    return known


def read_vocabulary(emojibase: Path, sets: Mapping[str, IconSet]) -> dict[str, str]:
    """Slugs of labels, then the names in the sets that say their characters, then Unicode names, then shortcodes."""
    rows = json.loads((emojibase / "en" / "data.json").read_text("utf-8"))
    unicode_names = json.loads((emojibase / "meta" / "unicode-names.json").read_text("utf-8"))
    labels = [(slug(row["label"]), plain(row["hexcode"])) for row in rows]
    names = [
        (name, plain(hexcode))
        for icon_set in sets.values()
        if not icon_set.prefix.startswith("openmoji")
        for hexcode, name in icon_set.chars.items()
    ]
    drawn = {(prefix, svg): plain(hexcode) for prefix, svg, hexcode in _drawings(sets)}
    aliases = [
        (name, drawn[key, svg])
        for key, icon_set in sets.items()
        for name, svg in icon_set.icons.items()
        if (key, svg) in drawn
    ]
    unicode_layer = [(slug(name), plain(code)) for code, name in unicode_names.items()]
    shortcodes = []
    for path in sorted((emojibase / "en" / "shortcodes").glob("*.json")):
        for code, found in json.loads(path.read_text("utf-8")).items():
            shortcodes += [(slug(name), plain(code)) for name in ([found] if isinstance(found, str) else found)]
    return vocabulary([labels, names, aliases, unicode_layer, shortcodes])


def _drawings(sets: Mapping[str, IconSet]) -> Iterable[tuple[str, str, str]]:
    for key, icon_set in sets.items():
        if not key.startswith("openmoji"):
            for hexcode, name in icon_set.chars.items():
                if name in icon_set.icons:
                    yield key, icon_set.icons[name], hexcode


def match(sets: Mapping[str, IconSet], words: Mapping[str, str]) -> dict[str, dict[str, tuple[str, ...]]]:
    """Set -> hexcode -> names of its drawings of that character, in the set's order.

    Only streamline-emojis has several drawings of a concept (a name that ends in "-1", "-2", ...); elsewhere the
    first name found counts.
    """
    squashed: dict[str, str] = {}
    for word, hexcode in words.items():
        squashed.setdefault(word.replace("-", ""), hexcode)
    codes = {  # set -> (name -> hexcode)
        "fxemoji": {**squashed, **FXEMOJI_NAMES},
        "streamline-emojis": {**{f"{w}-{i}": h for w, h in words.items() for i in range(1, 10)}, **words},
    }
    found = {}
    for key, icon_set in sets.items():
        if icon_set.chars or key == "fluent-emoji":  # both fluent colour sets draw the same concepts by the same names
            chars = icon_set.chars or sets["fluent-emoji-flat"].chars
            pairs = [(plain(code), name) for code, name in sorted(chars.items()) if name in icon_set.icons]
        else:
            lookup = codes.get(key, words)
            pairs = [(lookup[name], name) for name in icon_set.icons if lookup.get(name)]
        names: dict[str, list[str]] = defaultdict(list)
        for hexcode, name in pairs:
            if (key, name) in WRONG:
                continue
            if icon_set.icons[name] not in {icon_set.icons[other] for other in names[hexcode]}:  # not an alias
                names[hexcode].append(name)
        keep = None if key == "streamline-emojis" else 1
        found[key] = {hexcode: tuple(aliases[:keep]) for hexcode, aliases in names.items()}
    return found
