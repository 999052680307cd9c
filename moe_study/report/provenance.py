"""Which result files a figure shows, and the commands that make them: data that travel as metadata of the
figure's display in a notebook, from `notebook.show` to the report's page."""

from __future__ import annotations

import html
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_study import store
from moe_study.configs.run import Run

KEY = "moe_study"  # of an output's metadata: {"figure", "caption", "sources"}, or {"caption_of"} below it
COMMANDS = {"planted/trust.json": "trust", "planted/verdicts.json": "rates"}  # of files that are no runs

# {"profile", "study", "dataset", "arms", "runs"}, or {"file"} below the results folder
Source = dict[str, Any]


def sources(runs: Sequence[Run] = (), files: Sequence[Path] = ()) -> list[Source]:
    """One entry for all runs in a folder, and one for each other file. Runs without a result are left out."""
    found: dict[Path, Source] = {}
    for run in runs:
        if run.path.exists():
            # A text of the user's own goes by the name of its folder: its path is the machine's.
            names = {"profile": run.profile, "study": run.study, "dataset": run.path.parent.name}
            entry = found.setdefault(run.path.parent, {**names, "arms": [], "runs": 0})
            entry["runs"] += 1
            if run.arm not in entry["arms"]:
                entry["arms"].append(run.arm)
    others = [{"file": path.relative_to(store.results_dir()).as_posix()} for path in files]
    return [*found.values(), *others]


def marked(caption: str) -> str:
    """A caption as HTML, with what stands in backticks as code."""
    return re.sub("`([^`]+)`", r"<code>\1</code>", html.escape(caption))


def in_words(found: Sequence[Source]) -> str:
    """Folder, arms, number of files; of several entries, the folder that they have in common."""
    if not found:
        return "computed in this notebook"
    folders = [_folder(entry) for entry in found]
    if len(found) > 1:
        count = sum(entry.get("runs", 1) for entry in found)
        return f"results/{os.path.commonpath(folders)}/**/*.json ({count} files)"
    [entry], [folder] = found, folders
    if "file" in entry:
        return f"results/{entry['file']}"
    arms = entry["arms"]
    joined = arms[0] if len(arms) == 1 else "{" + ",".join(arms) + "}"
    return f"results/{folder}/{joined}-s[0-9]*.json ({entry['runs']} files)"


def below(name: str, found: Sequence[Source]) -> str:
    """What stands below a figure: its file, and where its numbers come from."""
    return f"figures/{name}.png, {'from ' * bool(found)}{in_words(found)}"


def _folder(entry: Source) -> str:
    if "file" in entry:
        return os.path.dirname(entry["file"])
    return f"{entry['profile']}/{entry['study']}/{entry['dataset']}"


def commands(found: Sequence[Source]) -> list[str]:
    """What makes the files: training of the one study and data set, or of more where there are several, then
    the notebooks that draw."""
    made = [f"python -m moe_study {COMMANDS[entry['file']]}" for entry in found if "file" in entry]
    runs = [entry for entry in found if "file" not in entry]
    for profile in dict.fromkeys(entry["profile"] for entry in runs):
        own = [entry for entry in runs if entry["profile"] == profile]
        command = f"python -m moe_study run --profile {profile}"
        for name in ("study", "dataset"):
            values = {entry[name] for entry in own}
            if len(values) == 1:
                command += f" --{name} {values.pop()}"
        made += [command, f"make render PROFILE={profile}"]
    return made
