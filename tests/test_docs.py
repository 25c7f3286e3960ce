"""The documentation is true: generated pages are current, links and paths resolve, commands and examples work."""

from __future__ import annotations

import importlib
import re
import runpy
import shlex
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from fleetune import spec as specs
from fleetune.cli import app
from fleetune.methods import METHODS
from fleetune.methods.base import Update, is_lora_a, is_lora_b
from fleetune.tensors import select
from fleetune.training.plan import ClientTask
from support import runs, tiny

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]

WALKS = (DOCS / "design" / "architecture.md", ROOT / "benchmarks" / "README.md")
NAMING_FILES = [*PAGES, ROOT / "benchmarks" / "README.md", ROOT / "cluster" / "README.md"]
EXAMPLES = {"platform/fleetune/methods/ffa_lora.py", "jobs/methods/ffa-lora.yaml", "tests/methods/test_ffa_lora.py"}
"""What the reader of docs/guides/adding_a_method.md writes."""

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def links(page: Path) -> list[Path]:
    """Files that a page links to or shows."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    local = [target.partition("#")[0] for target in targets if not re.match(r"\w+:", target)]
    return [(page.parent / target).resolve() for target in local if target]


def code(page: Path) -> list[str]:
    """Lines of code of a page, continued lines joined: fenced, indented by four spaces, or inside a sentence."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    fenced = [line for block in re.findall(r"```\w*\n(.*?)```", text, flags=re.S) for line in block.splitlines()]
    prose = re.sub(r"```.*?```", "", text, flags=re.S)
    return [*fenced, *re.findall(r"^    (.+)$", prose, flags=re.M), *re.findall(r"`([^`\n]+)`", prose)]


def commands(page: Path) -> list[str]:
    """What a page says to type: ``fleetune …`` without comments, loops unrolled to their first turn."""
    found = [re.search(r"(?:^|do )\s*(fleetune .*)", line) for line in code(page)]
    return [re.split(r"\s+#|;", match[1])[0].replace("$seed", "0") for match in found if match]


def test_generated_pages_are_what_the_code_says(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(DOCS)
    generated: dict[str, Any] = runpy.run_path(str(DOCS / "generate.py"))["PAGES"]
    pages = {"index.md", "reference/job_file.md", "reference/devices.md", "design/tree.md", "../README.md"}
    assert set(generated) == pages
    for name, page in generated.items():
        assert (DOCS / name).read_text(encoding="utf-8") == page(), f"run python docs/generate.py for {name}"


@every_page
def test_links_resolve(page: Path):
    missing = [str(target) for target in links(page) if not target.exists()]
    assert not missing


@every_page
def test_links_to_headings_resolve(page: Path):
    """A heading's anchor is its text in small letters, with dashes for blanks and without punctuation."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    missing = []
    for name, anchor in re.findall(r"\]\(([\w./-]*)#([^)\s]+)\)", text):
        target = (page.parent / name).resolve() if name else page
        headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), flags=re.M)
        anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
        missing += [f"{name}#{anchor}"] if anchor not in anchors else []
    assert missing == []


@pytest.mark.parametrize("page", NAMING_FILES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_a_page_names_exist(page: Path):
    """Paths are relative to the package, to the root, or to the page. A name without a folder may be one that a run writes,
    or the reader: on other pages than those that walk through the code it is not looked at."""
    named = set(re.findall(r"`([\w./-]+\.(?:py|c|h|yaml|sh))`", page.read_text(encoding="utf-8")))
    if page not in WALKS:
        named = {path for path in named if "/" in path}
    places = (ROOT, ROOT / "platform" / "fleetune", page.parent)
    missing = {path for path in named if not any((place / path).is_file() for place in places)}
    assert missing - {"spec.yaml"} - EXAMPLES == set()


def test_names_that_the_architecture_uses_are_those_of_the_code():
    """`Class.method`, `function` and `CONSTANT` of the walks: each part is a word of some module, script or test."""
    text = (DOCS / "design" / "architecture.md").read_text(encoding="utf-8")
    prose = re.sub(r"```.*?```", "", text, flags=re.S)
    parts = {part for name in re.findall(r"`([A-Za-z_][\w.]*)`", prose) for part in name.split(".")}
    sources = [*ROOT.glob("platform/fleetune/**/*.py"), ROOT / "tests" / "test_imports.py"]
    words = {word for file in sources for word in re.findall(r"\w+", file.read_text(encoding="utf-8"))}
    assert parts - words - {"parquet", "yaml", "layers", "0", "self_attn", "base_model"} == set()


def test_every_page_is_reached_from_the_index():
    assert {page for page in PAGES if page.parent != ROOT} - {*links(DOCS / "index.md"), DOCS / "index.md"} == set()


@pytest.mark.parametrize("name", METHODS)
def test_a_method_has_its_page_and_its_row(name: str):
    page = (DOCS / "methods" / f"{name}.md").read_text(encoding="utf-8")
    paper = re.findall(r"\d{4}\.\d{5}", METHODS[name].source)
    assert all(f"arxiv.org/abs/{number}" in page for number in paper)
    assert paper or "openreview.net/forum?id=" in page or "doi.org/" in page  # not every paper is on arXiv
    assert f"fleetune run jobs/methods/{name}.yaml" in page
    assert f"| [`{name}`](docs/methods/{name}.md) |" in (ROOT / "README.md").read_text(encoding="utf-8")


def verbs(program: Any) -> set[str]:
    """The names of a typer program's own commands."""
    return {command.name or command.callback.__name__ for command in program.registered_commands if command.callback}


@every_page
def test_documented_commands_exist_and_their_fields_too(page: Path):
    """Every command is one of the program's; every job file loads with its overrides."""
    known = verbs(app)
    for group in app.registered_groups:
        known |= {f"{group.name} {verb}" for verb in verbs(group.typer_instance)}
    for command in commands(page):
        _, verb, *words = shlex.split(command)
        if any(verb == group.name for group in app.registered_groups):
            verb = f"{verb} {words.pop(0)}"
        assert verb in known, command
        if verb in ("run", "plan", "adapters train") and words and words[0].startswith("jobs/"):
            overrides = [value for flag, value in pairwise(words) if flag == "--set"]
            if not any("…" in value for value in overrides):
                specs.load(ROOT / words[0], specs.parse_overrides(overrides))


def test_commands_are_found_in_the_text(tmp_path: Path):
    """Otherwise the test above would hold for pages without any."""
    page = tmp_path / "page.md"
    loop = "```\nfor s in 0 1; do fleetune sync $seed; done\n```"
    page.write_text(f"Say `fleetune ui`.\n\n    fleetune run a.yaml   # first\n\n{loop}")
    assert commands(page) == ["fleetune sync 0", "fleetune run a.yaml", "fleetune ui"]


def test_the_trees_list_every_room_and_every_module():
    """Otherwise a room that `docs/generate.py` passes over would be missing and the page still be current."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = re.search(r"## What is where\n\n```\n(.*?)```", text, flags=re.S)
    assert tree
    listed = re.findall(r"^ *([\w.-]+/?)(?:  .*)?$", tree[1], flags=re.M)
    packages = {f"{p.parent.name}/" for p in ROOT.glob("platform/fleetune/**/__init__.py")}
    assert packages <= set(listed)
    tree_page = (DOCS / "design" / "tree.md").read_text(encoding="utf-8")
    modules = {p.name for p in ROOT.glob("platform/fleetune/**/*.py") if p.name != "__init__.py"}
    assert modules <= set(re.findall(r"^ *([\w.-]+)", tree_page, flags=re.M))


def test_the_example_of_a_new_method_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """FFA-LoRA from docs/guides/adding_a_method.md: B alone goes down and up, A is drawn by the client and stays."""
    text = (DOCS / "guides" / "adding_a_method.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    assert len(blocks) == 2
    assert blocks[0] == (ROOT / "tests" / "support" / "server_rate.py").read_text(encoding="utf-8")
    (tmp_path / "ffa_lora.py").write_text(blocks[1], encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    module: Any = importlib.import_module("ffa_lora")
    problem = runs.problem(tiny.spec())
    method = module.FFALoRA(module.FFALoRAConfig(), problem.method.context)
    state = method.start()
    payload = method.broadcast(state, 0, None)
    assert set(payload.tensors) == set(select(state.tensors, is_lora_b))
    start = method.client_adapter(payload)
    runs.same_tensors(start, state.tensors)
    rows = problem.partition.shard(int(problem.eligible[0]))[:2].reshape(1, 2)
    task = ClientTask(client_id=0, weight=1.0, rows=rows, learning_rate=0.1, address=(0, 0))
    update = method.local_update(runs.worker(problem), payload, [task])
    assert update.upload is not None
    sent = update.upload.client(0)
    assert set(sent) == set(payload.tensors)
    assert all(not torch.equal(sent[name], start[name]) for name in sent)
    after = method.aggregate(state, [Update(sent, 1.0, (0,))], 0)
    runs.same_tensors(select(after.tensors, is_lora_a), select(state.tensors, is_lora_a))
    runs.same_tensors(select(after.tensors, is_lora_b), sent)
