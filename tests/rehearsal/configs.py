"""Mutated configs: each trains a step, or is refused in one clear line; no traceback.

A config is mutated as its YAML text, as its content, and as words on the command line. Whatever
comes of it is started as experiments/train_*.py would start it, for one step of a small net.
"""

import copy
import random
import resource
import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

# A fork starts at once because its parent has these.
import deit.recipe  # noqa: F401
import dinov2.recipe  # noqa: F401
import evaluation.probes.accuracy  # noqa: F401
import evaluation.probes.knn  # noqa: F401
import octic.models  # noqa: F401
import vit.models  # noqa: F401
from slurm.launch import launch
from tests.rehearsal.forks import Child, Outcome, say
from utils import metrics
from utils.config.build import plain
from utils.config.compose import compose_config, parse_config

MEMORY = 12 * 2**30  # bytes a child may map: a net of a thousand layers is refused, not swapped
PATIENCE_S = 120.0
MOST_STEPS = 3

SMALL = {
    "dinov2": [
        *("backbone.embed_dim=32", "backbone.depth=2", "backbone.num_heads=2"),
        *("recipe.batch_size_per_gpu=4", "recipe.crops.local_crops_number=1"),
        "recipe.dino_head={num_prototypes: 32, hidden_dim: 16, bottleneck_dim: 8}",
        *("probes.knn=null", "probes.linear=null", "probes.segmentation=null"),
    ],
    "deit": [
        *("backbone.embed_dim=32", "backbone.depth=2", "backbone.num_heads=2"),
        *("recipe.effective_batch_size=4", "recipe.batch_size_per_gpu=4", "probes.accuracy=null"),
    ],
}
COMMON = ["device=cpu", "training.max_steps=1", "training.log_every=1"]

# Wrong by kind, by sign, by size; text that YAML reads as something else.
VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 3, 7, 0.5, -0.5, 1e-9, 1e9, -1e9, 1e30, 2**31, 2**63),
    *(float("nan"), float("inf"), "", " ", "yes", "null", "1e-3", "auto", "no such thing", "ä"),
    *("../../..", "/dev/null", "a" * 300, "${nothing}", "${seed}", "???", "%j", "\n", "'"),
    *([], [1], [1, 2], [1, 2, 3], ["a"], [[1]], [None], {}, {"a": 1}, {"_target_": "os.system"}),
    {"_target_": "vit.models.nothing"},
]
TARGETS = [
    *("os.system", "subprocess.run", "builtins.eval", "vit", "vit.models", "vit.models.VIT", "a.b"),
    *("torch.optim.SGD", "torch.optim.LBFGS", "dinov2.recipe.DINOv2", "deit.recipe.DeiT", "", "."),
    *(
        "octic.models.hybrid_deit_small_patch16",
        "timm.create_model",
        "evaluation.probes.knn.KNNProbe",
    ),
]


def rehearse(count: int, folder: Path, *, seed: int = 0, say: Any = say) -> dict[str, Any]:
    """Mutate and start `count` configs; returns the figures, `faults` with what was wrong."""
    begun = time.monotonic()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    bases = {name: base_config(name) for name in SMALL}
    ends: Counter[str] = Counter()
    for number in range(count):
        draw = random.Random(seed * 1_000_003 + number)
        words, story = mutate(bases, draw, folder)
        outcome = Child(lambda words=words: start(words, folder), folder / "logs").wait(PATIENCE_S)
        end = judge(outcome)
        ends[end.partition(":")[0]] += 1
        if end not in ("ran", "refused"):
            say(f"FAULT {number} {story}: {end}")
        shutil.rmtree(folder / "run", ignore_errors=True)
    faults = sum(ends.values()) - ends["ran"] - ends["refused"]
    return {
        "configs": count,
        "ran": ends["ran"],
        "refused in one line": ends["refused"],
        "faults": faults,
        "seconds": round(time.monotonic() - begun),
    }


def base_config(recipe: str) -> dict[str, Any]:
    """A whole config as a run leaves it in its config.yaml."""
    words = [*SMALL[recipe], *COMMON]
    return plain(compose_config(f"{recipe}/quickstart.yaml", words))


def start(words: list[str], folder: Path) -> None:
    """What experiments/train_dinov2.py does, with the run folder kept within `folder`."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    torch.set_num_threads(1)
    metrics.draw_curves = lambda path: None
    config = plain(parse_config("dinov2/quickstart.yaml", words))
    if isinstance(config["output_dir"], str):
        config["output_dir"] = str(folder / "run")
    steps = config["training"]["max_steps"]
    if steps is None or isinstance(steps, int) and steps > MOST_STEPS:  # right, and long
        config["training"]["max_steps"] = MOST_STEPS
    launch("utils.run.train", config)


def judge(outcome: Outcome) -> str:
    """ran, refused, or what is wrong with how it ended."""
    if outcome.code is None:
        return f"hung: no end after {outcome.seconds:.0f} s, said {outcome.stderr[-300:]!r}"
    if "Traceback" in outcome.stderr:
        return f"traceback: {outcome.stderr.strip().splitlines()[-1][:300]}"
    errors = [line for line in outcome.stderr.splitlines() if line.startswith("error: ")]
    if outcome.code == 0 and not errors:
        return "ran"
    if outcome.code == 2 and len(errors) == 1 and 12 < len(errors[0]) < 1500:
        return "refused"
    return f"unclear: exit {outcome.code}, said {outcome.stderr[-300:]!r}"


def mutate(
    bases: dict[str, dict[str, Any]], draw: random.Random, folder: Path
) -> tuple[list[str], str]:
    """Words for the command line, and a line that tells what was done."""
    recipe = draw.choice(list(bases))
    content = copy.deepcopy(bases[recipe])
    how = draw.choice(["content", "content", "content", "text", "words", "words"])
    if how == "words":
        words, story = _mutate_words(content, draw)
        return (
            ["--config-file", f"{recipe}/quickstart.yaml", *SMALL[recipe], *COMMON, *words],
            f"{recipe} {story}",
        )
    if how == "text":
        text, story = _mutate_text(yaml.safe_dump(content, sort_keys=False), draw)
    else:
        stories = [draw.choice(CHANGES)(content, draw) for _ in range(draw.choice([1, 1, 1, 2, 4]))]
        text, story = yaml.safe_dump(content, sort_keys=False), "; ".join(stories)
    path = folder / "config.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return ["--config-file", str(path)], f"{recipe} {story}"


def _places(node: Any, where: tuple = ()) -> list[tuple]:
    # Paths of all keys of a tree of dicts and lists.
    items = node.items() if isinstance(node, dict) else enumerate(node)
    found = []
    for key, value in items:
        found.append((*where, key))
        if isinstance(value, dict | list):
            found += _places(value, (*where, key))
    return found


def _parent(content: Any, place: tuple) -> Any:
    for key in place[:-1]:
        content = content[key]
    return content


def _change_value(content: Any, draw: random.Random) -> str:
    place = draw.choice(_places(content))
    value = copy.deepcopy(draw.choice(VALUES))
    _parent(content, place)[place[-1]] = value
    return f"{'.'.join(map(str, place))}={value!r}"


def _scale_number(content: Any, draw: random.Random) -> str:
    def is_number(place: tuple) -> bool:
        value = _parent(content, place)[place[-1]]
        return isinstance(value, int | float) and not isinstance(value, bool)

    place = draw.choice([p for p in _places(content) if is_number(p)] or _places(content)[:1])
    value = _parent(content, place)[place[-1]]
    number = value if isinstance(value, int | float) else 1
    new = draw.choice([-number, number * 10, number / 3, number + 1, number - 1, -number - 1])
    _parent(content, place)[place[-1]] = new
    return f"{'.'.join(map(str, place))}={new!r}"


def _remove(content: Any, draw: random.Random) -> str:
    place = draw.choice(_places(content))
    del _parent(content, place)[place[-1]]
    return f"without {'.'.join(map(str, place))}"


def _misspell(content: Any, draw: random.Random) -> str:
    place = draw.choice([p for p in _places(content) if isinstance(p[-1], str)])
    key = place[-1]
    at = draw.randrange(len(key) + 1)
    new = draw.choice([key[:at] + key[at + 1 :], key[:at] + "x" + key[at:], key.upper(), key + " "])
    parent = _parent(content, place)
    parent[new] = parent.pop(key)
    return f"{'.'.join(map(str, place))} spelt {new!r}"


def _swap(content: Any, draw: random.Random) -> str:
    one, other = draw.choice(_places(content)), draw.choice(_places(content))
    value = copy.deepcopy(_parent(content, other)[other[-1]])
    _parent(content, one)[one[-1]] = value
    return f"{'.'.join(map(str, one))} as {'.'.join(map(str, other))}"


def _retarget(content: Any, draw: random.Random) -> str:
    places = [p for p in _places(content) if p[-1] == "_target_"]
    if not places:
        return "nothing"
    place = draw.choice(places)
    _parent(content, place)["_target_"] = draw.choice(TARGETS)
    return f"{'.'.join(map(str, place))}={_parent(content, place)['_target_']!r}"


def _add(content: Any, draw: random.Random) -> str:
    inner = [p for p in _places(content) if isinstance(_parent(content, p), dict)]
    parent = _parent(content, draw.choice(inner))
    key = draw.choice(
        ["extra", "_partial_", "_args_", "_target_", "defaults", 3, "", "a.b", "seed"]
    )
    parent[key] = copy.deepcopy(draw.choice(VALUES))
    return f"added {key!r}: {parent[key]!r}"


CHANGES: list[Callable[[Any, random.Random], str]] = [
    *(_change_value, _change_value, _change_value, _scale_number, _scale_number),
    *(_remove, _misspell, _swap, _retarget, _add),
]


def _mutate_text(text: str, draw: random.Random) -> tuple[str | bytes, str]:
    lines = text.splitlines(keepends=True)
    number = draw.randrange(len(lines))
    how = draw.choice(["cut", "indent", "tab", "double", "bytes", "drop", "brace", "root", "empty"])
    if how == "cut":
        text = text[: draw.randrange(len(text))]
    elif how == "bytes":
        data = bytearray(text.encode())
        for _ in range(draw.choice([1, 3, 10])):
            data[draw.randrange(len(data))] = draw.randrange(256)
        return bytes(data), "bytes overwritten"
    elif how == "root":
        text = draw.choice(
            ["- a\n- b\n", "3\n", "text\n", "a: &x [*x]\n", "{{a: b}: c}\n", "---\n"]
        )
    elif how == "empty":
        text = draw.choice(["", "\n", "# nothing\n", "null\n"])
    else:
        changes = {"indent": "   " + lines[number], "tab": "\t" + lines[number], "drop": ""}
        changes |= {"double": lines[number] * 2, "brace": lines[number].replace(":", ": {", 1)}
        lines[number] = changes[how]
        text = "".join(lines)
    return text, f"text: {how} at line {number + 1}"


def _mutate_words(content: Any, draw: random.Random) -> tuple[list[str], str]:
    place = draw.choice([p for p in _places(content) if all(isinstance(k, str) for k in p)])
    key = ".".join(place)
    value = str(draw.choice(VALUES))
    words = draw.choice(
        [
            [f"{key}={value}"],
            [f"{key}={value}"],
            [f"{key}={value}"],
            [f"{key}x={value}"],
            [f"+{key}={value}"],
            [f"++{key}={value}"],
            [f"~{key}"],
            [key],
            [f"={value}"],
            [f"{key}=[1,"],
            [f"{key}={{a:"],
            [f"{place[0]}=nothing"],
            ["--max-steps", value],
            ["--model", value],
            ["--weights", value],
            ["--ngpus", value],
            [f"--{place[-1]}"],
            ["--config-file", value],
        ]
    )
    return words, f"words {words}"
