"""docs/serving.md is true: its commands and programs run in order, against one live server, and show what it says.

The page is a session, so this is one test. The page's port is replaced by a free one, and training is cut short.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import openai
import pytest

from tailor.cli import serve
from tailor.cli.main import run
from tailor.config import load_recipe
from tailor.inference.hosted_endpoint import HostedSettings

for module in ("fastapi", "uvicorn", "sqlalchemy", "llguidance", "jsonschema"):
    pytest.importorskip(module)

PAGE = Path(__file__).parents[1] / "docs" / "serving.md"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SHELL = frozenset("(|<>\\&;")
SHORT = {"tune": ["train.num_steps=2"]}
MORE = ("--job-threads", "1", "--job-niceness", "0", "--record")
"""What the page's server is started with besides: a later section tells of `--record`."""
LAST_LINE = "Ctrl-C stops.\n"

ASKED = ("Where is my parcel?", "Can I return a tent?", "Is the hut open?")
SAID = ("On its way.", "Yes, within 30 days.", "From June on.")


class Block(NamedTuple):
    """A fenced block of the page, and the line on which it begins."""

    language: str
    text: str
    line: int


def blocks(port: int) -> list[Block]:
    page = PAGE.read_text("utf-8").replace(":8000", f":{port}")
    return [Block(found[1], found[2], page.count("\n", 0, found.start()) + 1) for found in BLOCK.finditer(page)]


def shape(value: Any) -> Any:
    """What a JSON value is made of: names and types, of a list its first item."""
    if isinstance(value, dict):
        return {key: shape(item) for key, item in value.items()}
    if isinstance(value, list):
        return [shape(item) for item in value[:1]]
    return "number" if type(value) in (int, float) else type(value).__name__


def is_plain(line: str) -> bool:
    """Whether a line is a command of tailor and nothing else."""
    return line.startswith("tailor ") and not SHELL.intersection(line)


class Reader:
    """Somebody who does what the page says, block by block, in one folder."""

    def __init__(self, folder: Path, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.port = port
        self.patch = monkeypatch
        self.server: subprocess.Popen[str] | None = None
        self.output = ""
        self.names: dict[str, Any] = {"__name__": "__main__"}

    def read(self, block: Block) -> None:
        """Do what a block says, or compare what it shows with what the last one printed."""
        doing = {"sh": self.sh, "python": self.python, "json": self.json, "text": self.text, "yaml": self.yaml}
        doing["nginx"] = self.nginx
        doing[block.language](block)

    def sh(self, block: Block) -> None:
        """Commands of tailor alone run in this process, which has loaded all that they need; others in a shell."""
        self.output = ""
        for plain, lines in groupby(block.text.splitlines(), is_plain):
            if not plain:
                self.output += self.bash("\n".join(lines))
            for line in lines if plain else ():
                words = shlex.split(os.path.expandvars(line), comments=True)
                if words[1] == "serve" and "--engine" not in words:
                    self.serve(words)
                else:
                    self.tailor(words[1:])

    def tailor(self, arguments: list[str]) -> None:
        told = io.StringIO()
        with contextlib.redirect_stdout(told):
            code = run([*arguments, *SHORT.get(arguments[0], ())])
        self.output += told.getvalue()
        assert code == 0, (arguments, self.output)

    def bash(self, commands: str) -> str:
        """Run commands; the variables they set are there for the blocks that follow."""
        after = self.folder / "environment"
        script = f"set -ea\n{commands}\nset +a\nenv -0 > {shlex.quote(str(after))}"
        ran = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=200)
        assert ran.returncode == 0, (commands, ran.stdout, ran.stderr)
        for pair in after.read_text().split("\0")[:-1]:
            name, _, value = pair.partition("=")
            if name not in ("_", "SHLVL", "PWD", "OLDPWD") and os.environ.get(name) != value:
                self.patch.setenv(name, value)
        return ran.stdout

    def serve(self, words: list[str]) -> None:
        """The first server is started and stays; of others only the command line is tried, up to the loading."""
        if self.server is not None:
            self.dry_run(words[1:])
            return
        self.output = ""
        words = [*words, "--port", str(self.port), *MORE]
        self.server = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        assert self.server.stdout is not None
        for line in self.server.stdout:
            self.output += line
            if line == LAST_LINE:
                return
        raise AssertionError(f"the server ended: {self.server.wait()}")

    def dry_run(self, arguments: list[str]) -> None:
        started: list[Any] = []
        with self.patch.context() as patch:
            patch.setattr(serve, "open_workshop", lambda *given: None)
            patch.setattr(serve, "run_server", lambda *given: started.append(given))
            assert run(arguments) == 0
        assert len(started) == 1

    def python(self, block: Block) -> None:
        told = io.StringIO()
        with contextlib.redirect_stdout(told):
            exec(compile(block.text, f"{PAGE}:{block.line}", "exec", dont_inherit=True), self.names)
        self.output = told.getvalue()
        assert "print(" not in block.text or self.output.strip()

    def json(self, block: Block) -> None:
        assert shape(json.loads(self.output)) == shape(json.loads(block.text))

    def text(self, block: Block) -> None:
        assert self.output.strip() == block.text.strip()

    def yaml(self, block: Block) -> None:
        path = self.folder / "hosted.yaml"
        path.write_text(block.text, "utf-8")
        (settings,) = load_recipe(path, HostedSettings).recipe.endpoints.values()
        assert settings.prices["example-model"].cached == 0.075

    def nginx(self, block: Block) -> None:
        """nginx itself says whether it would start with it, where there is one."""
        assert "server_name models.example.com;" in block.text
        assert block.text.count("{") == block.text.count("}")
        if (program := shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")) is not None:
            own = self.folder / "nginx"
            own.mkdir()
            kept = "".join(
                f"{kind}_temp_path {own};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
            )
            text = block.text.replace("listen 80;", f"listen unix:{own}/socket;")
            page = f"pid {own}/pid;\nerror_log stderr;\nevents {{}}\nhttp {{\naccess_log off;\n{kept}{text}}}\n"
            (own / "nginx.conf").write_text(page)
            tried = subprocess.run([program, "-t", "-c", own / "nginx.conf"], capture_output=True, text=True)
            assert tried.returncode == 0, tried.stderr

    def close(self) -> None:
        if self.server is not None:
            self.server.terminate()
            self.server.communicate(timeout=60)
        for value in self.names.values():
            if isinstance(value, openai.OpenAI):
                value.close()


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Reader]:
    if not (shutil.which("bash") and shutil.which("curl")):
        pytest.skip("the page's commands need bash and curl")
    monkeypatch.chdir(tmp_path)
    for name in ("TAILOR_HOME", "TAILOR_API_KEY", "OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    bin = tmp_path / "bin"
    bin.mkdir()
    python = shlex.quote(sys.executable)
    start = "from tailor.cli.main import main; main()"
    (bin / "tailor").write_text(f'#!/bin/sh\nexec {python} -c "{start}" "$@"\n')
    (bin / "python3").write_text(f'#!/bin/sh\nexec {python} "$@"\n')
    for program in bin.iterdir():
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin}:{os.environ['PATH']}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    plain = [{"prompt": f"{ASKED[k % 3]} ({k})", "completion": SAID[k % 3]} for k in range(12)]
    chats = [
        {"messages": [{"role": "user", "content": p["prompt"]}, {"role": "assistant", "content": p["completion"]}]}
        for p in plain
    ]
    for name, rows in (("rows.jsonl", plain), ("chats.jsonl", chats)):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    reading = Reader(tmp_path, port, monkeypatch)
    yield reading
    reading.close()


def test_the_page_does_what_it_says(reader: Reader) -> None:
    for block in blocks(reader.port):
        try:
            reader.read(block)
        except Exception as error:
            raise AssertionError(f"docs/serving.md, line {block.line}: {error}") from error
