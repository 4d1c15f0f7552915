"""metrics.jsonl: one JSON object a line, with null for what is not finite."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from utils.whole_file import write_text


def as_line(values: Mapping[str, float]) -> str:
    """The line for values of one step; JSON knows no NaN."""
    finite = {k: v if math.isfinite(v) else None for k, v in values.items()}
    return json.dumps(finite) + "\n"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; one torn by a crash is left out, null (not finite) is NaN."""
    lines = []
    for text in Path(path).read_text().splitlines() if Path(path).exists() else []:
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        lines.append({k: math.nan if v is None else v for k, v in line.items()})
    return lines


def truncate(path: Path, step: int) -> None:
    """Drop the lines after `step`, so that a resumed run leaves none twice."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        kept = [line for line in read_metrics(path) if line["step"] <= step]
        write_text(path, "".join(map(as_line, kept)))
