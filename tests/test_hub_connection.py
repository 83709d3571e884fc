"""The Hub is asked once whether it answers, and what it says or leaves unsaid ends in one sentence, without retries."""

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from offprincipal.errors import TaskError
from offprincipal.tasks import open_task

LIBRARYS_OWN = "/api/agent-harnesses"  # what some versions look up by themselves
PROGRAM = """
import sys
from offprincipal.errors import OffPrincipalError
from offprincipal.models import open_language_model
from offprincipal.training import evaluate, train
try:
    exec(sys.argv[1])
except OffPrincipalError as error:
    print("refused:", error)
"""


class Hub:
    """A server in the Hub's place, which counts what it is asked and hangs up, or answers that it has nothing."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.answers = False
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.path != LIBRARYS_OWN:
                    hub.asked.append(self.path)
                if hub.answers:
                    self.send_response(404)
                    self.send_header("X-Error-Code", "RepoNotFound")
                    self.end_headers()
                self.close_connection = True

            do_HEAD = do_GET  # noqa: N815  # as http.server names them

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    def run(self, home: Path, code: str) -> str:
        """What a process of its own prints, whose Hub this is."""
        address = f"http://127.0.0.1:{self.server.server_port}"
        environment = os.environ | {"HF_ENDPOINT": address, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
        command = [sys.executable, "-c", PROGRAM, code]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
        assert not done.stderr
        return done.stdout


@pytest.fixture
def hub() -> Iterator[Hub]:
    found = Hub()
    threading.Thread(target=found.server.serve_forever, daemon=True).start()
    yield found
    found.server.shutdown()
    found.server.server_close()


@pytest.mark.parametrize("name", ["bse", "org/bse"])
def test_a_model_that_is_nowhere_is_asked_for_once(hub: Hub, tmp_path: Path, name: str) -> None:
    code = f"train(recipe='grpo', tasks='add', model='{name}', out={str(tmp_path / 'run')!r}, quiet=True)"
    assert "not a local folder" in (said := hub.run(tmp_path, code)) and "the Hub cannot be reached" in said
    assert hub.asked == [f"/api/models/{name}"]
    hub.answers = True
    assert f"refused: {name} is neither a local file or folder nor a model on the Hub" in hub.run(tmp_path, code)
    assert hub.asked == [f"/api/models/{name}"] * 2


def test_a_model_in_the_cache_is_opened_though_the_hub_is_away(hub: Hub, tmp_path: Path, tiny_model: Path) -> None:
    cached = tmp_path / "hub" / "models--org--tiny"
    shutil.copytree(tiny_model, cached / "snapshots" / "a")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("a")
    assert hub.run(tmp_path, "print(open_language_model('org/tiny', 'cpu').eos_ids)") == "[1]\n"
    assert hub.asked == ["/api/models/org/tiny"]


def test_a_data_set_is_asked_for_once(hub: Hub, tmp_path: Path) -> None:
    code = "evaluate('embedded', 'hf:org/sums')"
    said = hub.run(tmp_path, code)
    assert said.startswith("refused: data set 'org/sums'") and "cannot be read" in said
    assert hub.asked == ["/api/datasets/org/sums"]
    hub.answers = True
    assert "org/sums is neither a local file or folder nor a dataset" in hub.run(tmp_path, code)


def test_a_data_file_that_is_not_there_is_no_data_set_of_the_hub() -> None:
    with pytest.raises(TaskError, match=r"data file nofile\.jsonl is not there"):
        open_task("hf:nofile.jsonl")
