"""The section of a model card: put into the card that is there, safe whatever names hold, opened as a pull request."""

import base64
import json
import os
import subprocess
import sys
import threading
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from checkpoint_folders import base_weights, moved, stored, write_model

from offprincipal.comparison import compare, read_summary
from offprincipal.errors import FileError
from offprincipal.reports.card import FIGURE, PAIRS, README, anatomy_svg, pair_rows, section, with_section, write_card
from offprincipal.reports.places import without_paths

HOSTILE = "<script>|`x`|](javascript:1) $a$"
THERE = "---\nlicense: apache-2.0\ntags:\n- math\n---\n\n# My model\n\nIt counts.\n"


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, weights = tmp_path_factory.mktemp("card"), base_weights()
    runs = {
        name: write_model(root / f"run{i}", stored(moved(weights, 1e-3, i))) for i, name in enumerate(("rl", HOSTILE))
    }
    return compare(write_model(root / "base", weights), runs).write(root / "comparison")


def test_the_section_is_put_into_a_card_once_and_the_rest_is_kept(comparison: Path, tmp_path: Path) -> None:
    (tmp_path / README).write_text(THERE)
    summary = read_summary(comparison)
    for _ in range(2):
        written = write_card(summary, tmp_path, base_model="org/base").read_text()
    assert written.count("## What training did to the weights") == 1
    assert written.startswith("---\nlicense: apache-2.0\n") and "# My model\n\nIt counts." in written
    assert "- math\n- offprincipal\n" in written and "base_model: org/base" in written
    assert {path.name for path in tmp_path.iterdir()} == {README, FIGURE, PAIRS}


def test_what_follows_a_section_stays_behind_it() -> None:
    text = section_of("first")
    card = with_section(THERE, text) + "\n## After\n"
    again = with_section(card, section_of("second"))
    assert "second" in again and "first" not in again and again.index("second") < again.index("## After")


def section_of(word: str) -> str:
    return f"<!-- offprincipal: begin -->\n\n{word}\n\n<!-- offprincipal: end -->\n"


def test_metadata_that_name_a_base_keep_it() -> None:
    assert "base_model: own/base" in with_section(
        "---\nbase_model: own/base\n---\n# M\n", section_of("x"), "other/base"
    )


@pytest.mark.parametrize(
    "front",
    [
        "license: mit\nmodel-index: not a list  # of anyone\n",
        "tags:\n  - math\n  - rl  # both\n# mine\nwidget: {text: 'a: b'}\n",
        "tags: [math, rl]\nextra: {deep: [1, 2]}\n",
        "tags: math\n",
        "tags:\nlicense: mit\n",
        "",
        "{}\n",
    ],
)
def test_every_other_line_of_the_metadata_is_kept(front: str) -> None:
    card = f"---\n{front}---\n# M\n\n---\n\nText.\n"
    written = with_section(card, section_of("x"), "org/base")
    block = written.split("---\n")[1]
    tags = yaml.safe_load(front or "{}").get("tags") or []
    wanted = [*([tags] if isinstance(tags, str) else tags), "offprincipal"]
    assert yaml.safe_load(block) == {**yaml.safe_load(front or "{}"), "tags": wanted, "base_model": "org/base"}
    assert all(line in block.splitlines() for line in front.splitlines() if not line.startswith(("tags:", "{}")))
    assert "---\n# M\n\n---\n\nText.\n\n<!-- offprincipal: begin" in written
    assert with_section(written, section_of("x"), "org/base") == written


@pytest.mark.parametrize(
    "card", ["---\nA rule, not metadata\n---\nmore\n", "---\n{broken\n---\nmore\n", "# M\n\nmore\n"]
)
def test_what_is_no_metadata_stays_text(card: str) -> None:
    written = with_section(card, section_of("x"))
    assert written.startswith("---\ntags:\n- offprincipal\n---\n\n" + card)


def test_names_are_text_and_no_path_is_shown(comparison: Path) -> None:
    shared = without_paths(read_summary(comparison))
    text = section(shared, with_figure=True)
    table = text.split("```sh")[0]
    assert "<script>" not in table and "\\<script\\>" in table and "\\|\\`x\\`\\|" in table
    assert str(comparison.parent) not in text
    drawn = ET.fromstring(anatomy_svg(shared))
    assert any((each.text or "").startswith("<script>") for each in drawn.iter())  # as text, not as an element
    assert not [each for each in drawn.iter() if each.tag.endswith("script")]


def test_the_section_says_what_a_reader_has_to_know_and_names_no_option_of_a_command(comparison: Path) -> None:
    summary = without_paths(read_summary(comparison))
    runs = {f"run_{i}": summary["runs"]["rl"] for i in range(4)}
    runs["run_0"] = runs["run_0"] | {"warnings": ["the base is |odd|"]}
    pairs = [summary["pairs"][0] | {"run_a": "run_0", "run_b": f"run_{i}", "jaccard_z": 0.1} for i in range(5)]
    text = section(summary | {"runs": runs, "pairs": pairs}, with_figure=False).split("```sh")[0]
    assert "Note: run\\_0: the base is \\|odd\\|." in text
    assert (
        "5 pairs of runs changed the same entries about as often as the nulls explain." in text
        and "--explain" not in text
    )


def test_the_caption_is_about_the_figures_that_are_there(comparison: Path) -> None:
    summary = without_paths(read_summary(comparison))
    runs = {
        name: run | {"metrics": {"unchanged_fraction": run["metrics"]["unchanged_fraction"]}, "anatomy": {}}
        for name, run in summary["runs"].items()
    }
    text = section(summary | {"runs": runs, "pairs": []}, with_figure=False)
    assert "in brackets: a Gaussian update of equal norm (unchanged)." in text
    assert "energy" not in text and "low-magnitude" not in text.split("```sh")[0]


def test_a_pair_is_a_line_of_one_form(comparison: Path, tmp_path: Path) -> None:
    write_card(read_summary(comparison), tmp_path)
    rows = [json.loads(line) for line in (tmp_path / PAIRS).read_text().splitlines()]
    assert rows == list(pair_rows(without_paths(read_summary(comparison)))) and len(rows) == 2
    assert set(rows[0]) == {"schema", "base", "tuned", "run", "arguments", "versions", "metrics"}
    assert rows[0]["run"] == "rl" and set(rows[0]["metrics"]["unchanged_fraction"]) >= {"value", "low", "high"}


def test_a_damaged_summary_is_said_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="damaged"):
        write_card({"runs": {"rl": 3}, "base": "b"}, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


class Hub(BaseHTTPRequestHandler):
    """What of the Hub's HTTP interface a pull request takes: the model's card, where files go, the commit."""

    commits: list[list[dict[str, Any]]]
    card: str

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, content: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_GET(self) -> None:
        if self.path.endswith("/README.md") and not self.card:
            self.answer(b"{}", 404, X_Error_Code="EntryNotFound")
        elif self.path.endswith("/README.md"):
            self.answer(self.card.encode(), ETag='"1"', X_Repo_Commit="a" * 40)
        else:
            self.answer(b"{}", 404, X_Error_Code="RepoNotFound")

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if "/api/validate-yaml" in self.path:
            self.answer(b'{"errors": [], "warnings": []}')
        elif "/preupload/" in self.path:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            self.answer(json.dumps({"files": files}).encode())
        elif "/api/models/org/model/commit/main" in self.path and "create_pr=1" in self.path:
            assert self.headers["Authorization"] == "Bearer hf_test"
            self.commits.append([json.loads(line) for line in body.decode().splitlines()])
            url = f"http://{self.headers['Host']}"
            done = {
                "commitOid": "b" * 40,
                "commitUrl": f"{url}/org/model/commit/b",
                "pullRequestUrl": f"{url}/org/model/discussions/7",
            }
            self.answer(json.dumps(done | {"success": True}).encode())
        else:
            self.answer(b'{"error": "not found"}', 404, X_Error_Code="RepoNotFound")


@pytest.fixture
def hub() -> Iterator[ThreadingHTTPServer]:
    Hub.commits, Hub.card = [], THERE
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def push(hub: ThreadingHTTPServer, comparison: Path, tmp_path: Path, repo: str) -> subprocess.CompletedProcess[str]:
    endpoint = f"http://127.0.0.1:{hub.server_address[1]}"
    environment = os.environ | {"HF_ENDPOINT": endpoint, "HF_TOKEN": "hf_test", "HF_HOME": str(tmp_path / "home")}
    environment |= {"COLUMNS": "200", "HF_HUB_OFFLINE": "0"}
    command = [
        sys.executable,
        "-m",
        "offprincipal",
        "card",
        str(comparison),
        "--push",
        repo,
        "-o",
        str(tmp_path / "card"),
    ]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_it_is_opened_as_a_pull_request_on_the_card_that_is_there(
    hub: ThreadingHTTPServer, comparison: Path, tmp_path: Path
) -> None:
    done = push(hub, comparison, tmp_path, "org/model")
    assert done.returncode == 0, done.stderr
    assert "/org/model/discussions/7" in done.stdout
    (lines,) = Hub.commits
    files = {
        each["value"]["path"]: base64.b64decode(each["value"]["content"]) for each in lines if each["key"] == "file"
    }
    assert set(files) == {README, FIGURE, PAIRS}
    assert "# My model" in files[README].decode() and "license: apache-2.0" in files[README].decode()
    assert files[PAIRS] == (tmp_path / "card" / PAIRS).read_bytes()


def test_a_card_that_cannot_be_fetched_is_not_replaced_by_none(
    comparison: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Hub drops out between the card and the commit: what answers then must not get a card without the old one."""
    silent = ThreadingHTTPServer(("127.0.0.1", 0), Hub)  # bound, so that nobody else is there, and answers nothing
    address = f"http://127.0.0.1:{silent.server_address[1]}"
    silent.server_close()
    monkeypatch.setenv("HF_ENDPOINT", address)
    code = (
        "import sys, huggingface_hub as hub; from pathlib import Path; from offprincipal.cli import main\n"
        "made = sys.argv.pop(); hub.HfApi.create_commit = lambda *a, **k: Path(made).touch()\n"  # the Hub, back again
        "main()"
    )
    made = tmp_path / "committed"
    command = [sys.executable, "-c", code, "card", str(comparison), "--push", "org/model", "-o", str(tmp_path / "card")]
    environment = os.environ | {"HF_TOKEN": "hf_test", "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    done = subprocess.run([*command, str(made)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "cannot open a pull request for org/model" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and not made.exists()


def test_a_card_of_another_model_in_the_folder_is_not_pushed(
    hub: ThreadingHTTPServer, comparison: Path, tmp_path: Path
) -> None:
    (tmp_path / "card").mkdir()
    (tmp_path / "card" / README).write_text("# Of another model\n")
    Hub.card = ""
    assert push(hub, comparison, tmp_path, "org/model").returncode == 0
    assert "Of another model" not in (tmp_path / "card" / README).read_text()


def test_the_base_on_the_hub_is_named_in_place_of_a_folder(comparison: Path, tmp_path: Path) -> None:
    readme = write_card(read_summary(comparison), tmp_path / "card", "org/base").read_text()
    assert "Measured from `org/base`" in readme and "offprincipal compare org/base" in readme
    rows = [json.loads(line) for line in (tmp_path / "card" / PAIRS).read_text().splitlines()]
    assert {row["base"] for row in rows} == {"org/base"}


def test_a_model_that_there_is_not_ends_with_exit_code_2_and_the_files_are_kept(
    hub: ThreadingHTTPServer, comparison: Path, tmp_path: Path
) -> None:
    done = push(hub, comparison, tmp_path, "org/nowhere")
    assert done.returncode == 2 and "cannot open a pull request for org/nowhere" in done.stderr
    assert "Traceback" not in done.stderr
