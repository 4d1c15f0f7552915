"""Write one self-contained HTML page about a run folder: no script, no request, opens from disk.

All text that is read from files is escaped in the page.
"""

import html
from collections.abc import Iterable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from evaluation.report.charts import chart
from evaluation.report.collect import MOST_FILES, REPORT, Contents, Results, collect
from evaluation.report.figures import Table, flat, tables
from evaluation.report.images import MOST_PICTURES, embed, is_wide
from utils.errors import UserError
from utils.panels import panels
from utils.whole_file import whole_file

STYLE = Path(__file__).with_name("style.css")
ROWS_PER_TABLE = 16  # of a narrow one; the rest stands beside it
NARROW = 3  # columns
LONG_TABLE = 32  # rows; a longer one with a title is folded
WIDE_TABLE = 6  # columns; of a wider one the last would be out of sight beside the protocol
LONG_PROTOCOL = 16  # entries; a longer one does not fit beside the figures
# What a picture shows, by the beginning of its file's name.
CAPTIONS = {
    "losses": "losses",
    "curves": "curves of the training",
    "pca": "principal components of the patch features as colours",
    "neighbours": "validation images and their nearest training images",
    "attention_heads": "attention of the class token, head by head",
    "attention": "attention of the class token",
    "segmentation": "segmentation",
    "equivariance": "equivariance",
}


def write_report(folder: str | Path, output: str | Path | None = None) -> Path:
    """Write the page of `folder` and return its path, by default `folder`/report.html.

    output: another file, or an existing folder. UserError if there is nothing to report, or if the
    page cannot be written.
    """
    content = page(collect(folder))
    path = Path(output or folder)
    try:
        path = path / REPORT if path.is_dir() else path
        with whole_file(path) as partial:
            # A file's name need not be text; what is none becomes a question mark.
            partial.write_text(content, encoding="utf-8", errors="replace")
    except OSError as error:
        elsewhere = "" if output else "; --output FILE writes it elsewhere"
        raise UserError(f"cannot write {path}: {error.strerror}{elsewhere}") from None
    return path


def page(found: Contents) -> str:
    """The whole page."""
    every_picture = list(_pictures_of(found))
    embedded = embed(every_picture)
    body = "\n".join(_run(found, embedded, top=True))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(found.name)}</title>\n<style>\n{STYLE.read_text()}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n<footer>{_text(found.folder)}</footer>\n</main>\n</body>\n</html>\n"
    )


def _run(found: Contents, embedded: Mapping[Path, str], *, top: bool) -> Iterator[str]:
    yield from _header(found, found.name if top else found.folder.name)
    yield from _facts(found)
    if found.notes:
        lines = "<br>".join(_text(note) for note in found.notes)
        yield f'<p class="notes">{lines}</p>'
    yield from _section("Results", "", map(_result, found.results))
    drawn = panels(found.metrics)
    if len(found.runs) > 1:
        drawn = _side_by_side(found.runs) | drawn
    yield from _section("Curves", "charts", (chart(title, drawn[title]) for title in drawn))
    pictures = [_picture(path, found, embedded) for path in found.pictures]
    yield from _section("Pictures", "pictures", pictures)
    for run in found.runs:
        yield f'<section class="run" id="{_text(run.folder.name)}">'
        yield from _run(run, embedded, top=False)
        yield "</section>"
    yield from _files(found)
    if found.config_text:
        text = _text(found.config_text)
        yield f"<h2>Config</h2><details><summary>config.yaml</summary><pre>{text}</pre></details>"


def _header(found: Contents, title: str) -> Iterator[str]:
    yield f"<header><h1>{_text(title)}</h1>"
    what = _what(found.config)
    if what:
        yield f'<p class="what">{_text(what)}</p>'
    facts = []
    if found.began and found.ended:
        began, ended = (time.strftime("%Y-%m-%d %H:%M") for time in (found.began, found.ended))
        facts.append(began if began == ended else f"{began} to {ended}")
    if found.code:
        facts.append(f"code {found.code}")
    if facts:
        yield f'<p class="what">{_text(" · ".join(facts))}</p>'
    yield "</header>"


def _what(config: Mapping[str, Any]) -> str:
    """The backbone, recipe and data of a training, in words."""
    parts = []
    backbone = config.get("backbone")
    if isinstance(backbone, Mapping):
        said = {k: v for k, v in backbone.items() if k[:1] != "_" and k != "model_name"}
        options = ", ".join(f"{key} {value}" for key, value in said.items())
        parts.append(_target(backbone) + (f" ({options})" if options else ""))
    for key in ("recipe", "data"):
        node = config.get(key)
        if key == "data" and isinstance(node, Mapping):
            node = node.get("train") or node.get("val")
        if isinstance(node, Mapping) and _target(node):
            where = f" {node['root']}" if node.get("root") else ""
            parts.append(f"{key} {_target(node)}{where}")
    return " · ".join(parts)


def _target(node: Mapping[str, Any]) -> str:
    return str(node.get("model_name") or str(node.get("_target_", "")).split(".")[-1])


def _facts(found: Contents) -> Iterator[str]:
    summary = dict(found.summary)
    facts: dict[str, str] = {}
    if "step" in summary:
        step, total = summary.pop("step"), summary.pop("total_steps", None)
        facts["step"] = _value(step) + (f" of {_value(total)}" if total else "")
        if not summary.pop("finished", True):
            facts["step"] += ", unfinished"
    elif found.metrics:
        facts["last step logged"] = _value(found.metrics[-1]["step"])
    seconds = summary.pop("seconds", None)
    if isinstance(seconds, int | float):
        facts["time"] = str(timedelta(seconds=round(seconds)))
    for key, value in summary.items():
        if "/" not in key and key not in ("name", "output_dir") and value not in ("", None):
            facts[key.replace("_", " ")] = _value(value)
    if facts:
        cells = (f"<div><dt>{_text(key)}</dt><dd>{_text(facts[key])}</dd></div>" for key in facts)
        yield f'<dl class="facts">{"".join(cells)}</dl>'


def _result(result: Results) -> str:
    """One probe: its figures, with the protocol beside them, or folded below for want of room."""
    found = tables(result.probe, result.figures)
    known = flat(result.protocol)
    terms = (f"<dt>{_text(key)}</dt><dd>{_text(_value(value))}</dd>" for key, value in known)
    source = f'<span class="quiet"> {_text(result.source)}</span>'
    protocol = f"<dl>{''.join(terms)}</dl>" if result.protocol else ""
    wide = any(len(table.columns) > WIDE_TABLE for table in found)
    long = wide or len(known) > LONG_PROTOCOL
    if protocol and long:
        title = f"protocol, {len(known)} entries"
        protocol = f'<details class="protocol"><summary>{title}</summary>{protocol}</details>'
    elif protocol:
        protocol = f'<div class="protocol"><h3>protocol</h3>{protocol}</div>'
    return (
        f'<div class="result{" long" if long else ""}"><div><h3>{_text(result.probe)}{source}</h3>'
        f'<div class="figures">{"".join(map(_table, found))}</div></div>{protocol}</div>'
    )


def _table(table: Table) -> str:
    head = "".join(f'<th class="number">{_text(column)}</th>' for column in table.columns)
    head = f"<thead><tr><th></th>{head}</tr></thead>" if any(table.columns) else ""
    rows = []
    for label, values in table.rows:
        cells = (f'<td class="{_kind(value)}">{_text(_value(value))}</td>' for value in values)
        rows.append(f"<tr><td>{_text(label)}</td>{''.join(cells)}</tr>")
    if len(rows) > LONG_TABLE and table.title:
        title = f"<summary>{_text(table.title)}, {len(rows)} rows</summary>"
        content = f"<table>{head}<tbody>{''.join(rows)}</tbody></table>"
        return f'<details class="rows">{title}{content}</details>'
    many = ' class="many"' if len(table.columns) > NARROW else ""
    caption = f"<caption>{_text(table.title)}</caption>" if table.title else ""
    most = ROWS_PER_TABLE if len(table.columns) <= NARROW else len(rows)
    pieces = (rows[start : start + most] for start in range(0, len(rows), most))
    return "".join(
        f"<table{many}>{caption}{head}<tbody>{''.join(piece)}</tbody></table>" for piece in pieces
    )


def _kind(value: object) -> str:
    """Words may be broken to fit the page, numbers may not."""
    return "words" if isinstance(value, str) else "number"


def _side_by_side(runs: Iterable[Contents]) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """The loss of every run in one chart."""
    losses = {
        run.folder.name: [(int(at["step"]), at["loss"]) for at in run.metrics if "loss" in at]
        for run in runs
    }
    losses = {name: points for name, points in losses.items() if len(points) > 2}
    return {"loss of each run": losses} if losses else {}


def _picture(path: Path, found: Contents, embedded: Mapping[Path, str]) -> str:
    name = path.relative_to(found.folder).as_posix()
    starts = (start for start in CAPTIONS if path.stem.startswith(start))
    what = CAPTIONS.get(next(starts, ""), path.stem.replace("_", " "))
    caption = f"<figcaption><b>{_text(what)}</b> {_text(name)}</figcaption>"
    if path not in embedded:
        return f"<figure>{caption}<p>not shown: unreadable, or one too many</p></figure>"
    wide = ' class="wide"' if is_wide(path) else ""
    return f'<figure{wide}><img src="{embedded[path]}" alt="{_text(what)}">{caption}</figure>'


def _files(found: Contents) -> Iterator[str]:
    files = [*found.checkpoints, *found.files[:MOST_FILES]]
    if not files:
        return
    rows = "".join(
        f'<tr><td>{_text(name)}</td><td class="number">{_size(size)}</td></tr>'
        for name, size in files
    )
    more = len(found.files) - MOST_FILES
    rest = f'<p class="quiet">and {more} more files</p>' if more > 0 else ""
    yield f"<h2>Checkpoints and files</h2><table><tbody>{rows}</tbody></table>{rest}"


def _pictures_of(found: Contents) -> Iterator[Path]:
    yield from found.pictures[:MOST_PICTURES]
    for run in found.runs:
        yield from _pictures_of(run)


def _section(title: str, style: str, parts: Iterable[str]) -> Iterator[str]:
    content = "\n".join(part for part in parts if part)
    if content:
        yield f'<h2>{title}</h2>\n<div class="{style}">\n{content}\n</div>'


def _value(value: Any) -> str:
    if value is None or value == {}:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        return f"{value:,.0f}" if abs(value) < 1e15 else f"{value:.4g}"
    if isinstance(value, float):
        return f"{value:.2f}" if 10 <= abs(value) < 1e5 else f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(_value(item) for item in value)
    return str(value)


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def _text(value: object) -> str:
    return html.escape(str(value))
