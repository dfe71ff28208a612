"""Pushing to the Hub: a fake one on the loopback interface that speaks the LFS half of the protocol."""

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import huggingface_hub
import pytest
from fake_hub import Pushed, Repository, taking
from tiny import ROOT

from merge import Options, check_push, merge_checkpoint, plan_from_method, push_folder
from merge.errors import HubError

TOKEN = Pushed().token
TO = "alice/small"

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub's own, of its LFS upload


@pytest.fixture
def hub():
    """A Hub without repositories; its address is `hub.address`."""
    state = Pushed()
    with taking(state) as address:
        state.address = address
        yield state


@pytest.fixture
def online(hub, monkeypatch):
    """This process may reach the Hub, and alice is logged in."""
    for name, value in (("HF_HUB_OFFLINE", False), ("HF_HUB_DISABLE_XET", True), ("ENDPOINT", hub.address)):
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return hub


@pytest.fixture(scope="module")
def folder(llama, tmp_path_factory):
    """A finished merge with its weights in several shards."""
    out = tmp_path_factory.mktemp("pushed") / "out"
    merge_checkpoint(plan_from_method("drop-last", 32, 2), llama, out, Options(max_shard_size="40kB"))
    return out


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def own(repository):
    """The files of a repository but the one that the Hub puts there."""
    return {name: data for name, data in repository.files.items() if name != ".gitattributes"}


# ---------------------------------------------------------------------------------------------------------------------
# Whole, and private unless asked


@pytest.mark.parametrize("public", [False, True])
@pytest.mark.parametrize("repo_id", [TO, "lab/small"])
def test_all_files_in_one_commit(online, folder, repo_id, public):
    before = files_of(folder)
    assert push_folder(folder, repo_id, public=public) == f"{online.address}/{repo_id}"
    there = online.repositories[repo_id]
    assert there.private is not public
    assert own(there) == before == files_of(folder)
    assert len(online.blobs) > 1, "weights in several shards"
    assert there.commits == 2, "the first one comes with the repository"


def test_private_is_the_default(online, folder):
    push_folder(folder, TO)
    assert online.repositories[TO].private


def test_an_empty_repository_is_filled(online, folder):
    online.repositories[TO] = Repository(private=True)
    push_folder(folder, TO)
    assert own(online.repositories[TO]) == files_of(folder)


def test_overwrite_replaces_all_of_it_in_one_commit(online, folder):
    old = {".gitattributes": b"", "plan.json": b"{}", "model-00001-of-00009.safetensors": b"old"}
    online.repositories[TO] = Repository(private=True, files=old)
    push_folder(folder, TO, overwrite=True)
    assert own(online.repositories[TO]) == files_of(folder)
    assert online.repositories[TO].commits == 2


# ---------------------------------------------------------------------------------------------------------------------
# Refused before anything is done


@pytest.mark.parametrize(
    ("repo_id", "said"),
    [
        ("small", "expected USER/NAME"),
        ("", "cannot name a repository"),
        ("alice/sm all", "cannot name a repository"),
        ("datasets/alice/small", "cannot name a repository"),
        ("bob/small", "your login may write to alice, lab, not to bob"),
    ],
)
def test_wrong_names(online, repo_id, said):
    with pytest.raises(HubError, match=said):
        check_push(repo_id)
    assert online.requests in ([], ["whoami"])


def test_no_login(online, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(HubError, match="log in with 'hf auth login', or set HF_TOKEN"):
        check_push(TO)
    assert online.requests == []


def test_a_login_that_will_not_do(online, monkeypatch):
    online.role = "read"
    with pytest.raises(HubError, match="your token may only read"):
        check_push(TO)
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    with pytest.raises(HubError, match="the login is not valid") as caught:
        check_push(TO)
    assert "hf_another" not in str(caught.value)


def test_no_network(online, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match=r"the Hub at http://127\.0\.0\.1:9 cannot be reached"):
        check_push(TO)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set"):
        check_push(TO)


def test_what_others_wrote_is_not_replaced(online, folder):
    online.repositories[TO] = Repository(private=True, files={"model.safetensors": b"precious", "plan.json": b"{}"})
    with pytest.raises(HubError, match="is not empty; choose another name, or replace its files with --overwrite"):
        push_folder(folder, TO)
    del online.repositories[TO].files["plan.json"]
    with pytest.raises(HubError, match=r"holds no plan\.json"):
        push_folder(folder, TO, overwrite=True)
    assert online.repositories[TO].files == {"model.safetensors": b"precious"}


def test_visibility_is_never_changed(online):
    online.repositories[TO] = Repository(private=False)
    with pytest.raises(HubError, match="exists and is public; push with --public"):
        check_push(TO)
    assert check_push(TO, public=True) == online.repositories[TO].sha
    online.repositories[TO] = Repository(private=True)
    with pytest.raises(HubError, match="exists and is private; push without --public"):
        check_push(TO, public=True)


def test_only_model_folders(online, tmp_path):
    with pytest.raises(HubError, match=r"holds no config\.json"):
        push_folder(tmp_path, TO)
    assert online.requests == []


# ---------------------------------------------------------------------------------------------------------------------
# Failed on the way


@pytest.mark.parametrize("route", ["create", "preupload", "batch", "put", "commit"])
def test_a_failed_upload_says_how_to_go_on(online, folder, route):
    before = files_of(folder)
    online.failing = {route}
    with pytest.raises(HubError) as caught:
        push_folder(folder, TO)
    said = str(caught.value)
    assert said.startswith(f"{folder} is whole, but pushing it to {TO} failed: ")
    assert f"no {route} today" in said
    assert said.endswith(f"try again with: hf upload {TO} {folder} . --private")
    assert files_of(folder) == before
    assert all(own(there) == {} for there in online.repositories.values()), "nothing half there"
    online.failing = set()
    push_folder(folder, TO)
    assert own(online.repositories[TO]) == before


def test_a_file_that_does_not_arrive_is_noticed(online, folder):
    online.ignoring = {"plan.json"}
    with pytest.raises(HubError, match=r"failed: plan\.json did not arrive whole; look at"):
        push_folder(folder, TO)


def test_a_commit_in_between_is_not_overwritten(online, folder):
    online.repositories[TO] = Repository(private=True)
    online.when = lambda route: setattr(online.repositories[TO], "commits", 5) if route == "batch" else None
    with pytest.raises(HubError, match="A commit has happened since"):
        push_folder(folder, TO)
    assert own(online.repositories[TO]) == {}


# ---------------------------------------------------------------------------------------------------------------------
# The script

MERGE = ("--method", "drop-last", "--layers", "2", "--model", "tiny:llama3-8b", "--out", "out")


@pytest.fixture
def merge(tmp_path, tiny_cache, hub):
    """Runs merge.py in an empty folder, online and with HF_TOKEN unless changed; None takes a variable away."""
    (tmp_path / "here").mkdir()
    changes = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.address, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}
    environment = os.environ | {"XDG_CACHE_HOME": str(tiny_cache), "HF_HOME": str(tmp_path / "hf")} | changes

    def call(*arguments, status=0, **changes):
        settings = {name: value for name, value in (environment | changes).items() if value is not None}
        command = [sys.executable, str(ROOT / "scripts" / "merge.py"), *MERGE, *arguments]
        done = subprocess.run(command, cwd=call.folder, env=settings, capture_output=True, text=True, timeout=120)
        assert done.returncode == status, f"{done.stdout}\n{done.stderr}"
        assert TOKEN not in done.stdout + done.stderr
        return done

    call.folder = tmp_path / "here"
    call.environment = environment
    return call


def test_merged_and_pushed(merge, hub, tmp_path):
    """With the stored login; the most talkative log does not tell the token, nor does any file."""
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "token").write_text(TOKEN)
    done = merge("--push-to-hub", TO, "-vv", HF_TOKEN=None)
    assert done.stdout.splitlines() == ["out", f"{hub.address}/{TO}"]
    assert own(hub.repositories[TO]) == files_of(merge.folder / "out")
    assert hub.repositories[TO].private
    assert not any(TOKEN.encode() in data for data in files_of(merge.folder / "out").values())


def test_nothing_is_pushed_unasked(merge, hub):
    merge()
    assert hub.requests == []


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (("--public",), 2, "--public goes with --push-to-hub"),
        (("--push-to-hub", TO, "--dry-run"), 2, "--push-to-hub does not go with --dry-run"),
        (("--push-to-hub", "small"), 1, "expected USER/NAME"),
    ],
)
def test_refused_before_the_work(merge, hub, arguments, status, said):
    done = merge(*arguments, status=status)
    assert said in done.stderr.splitlines()[-1]
    assert os.listdir(merge.folder) == []
    assert hub.requests == []


def test_the_command_in_the_message_works(merge, hub):
    hub.failing = {"commit"}
    done = merge("--push-to-hub", TO, "-q", status=1)
    assert done.stdout == "out\n"
    (line,) = done.stderr.splitlines()
    again = shlex.split(line.partition("try again with: ")[2])
    assert again == ["hf", "upload", TO, "out", ".", "--private"]
    hub.failing = set()
    program = Path(sys.executable).with_name("hf")
    done = subprocess.run(
        [program, *again[1:]], cwd=merge.folder, env=merge.environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert own(hub.repositories[TO]) == files_of(merge.folder / "out")


def test_stopped_while_pushing(merge, hub):
    """Ctrl-C during an upload says what is there, not that nothing was written."""
    sending = threading.Event()

    def when(route):
        if route == "batch":
            sending.set()
            time.sleep(2)

    hub.when = when
    command = [sys.executable, str(ROOT / "scripts" / "merge.py"), *MERGE, "--push-to-hub", TO, "-q"]
    process = subprocess.Popen(
        command, cwd=merge.folder, env=merge.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # jobs in the background of a shell ignore it
    )  # fmt: skip
    assert sending.wait(60)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said == ("out\n", f"stopped while pushing; out is whole; push it with: hf upload {TO} out . --private\n")
    assert json.loads((merge.folder / "out" / "config.json").read_text())["num_hidden_layers"] == 30
