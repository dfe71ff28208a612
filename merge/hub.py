"""Model folders to the Hub: one commit that holds everything, private unless asked, nobody's repository replaced unasked.

The weights are sent first (by xet or LFS; what arrived in an earlier try is not sent again) and one commit names all files, so
that the repository never holds half a model. huggingface_hub's own `upload_folder` may commit in parts what takes more than a
few minutes to send. Who you are is huggingface_hub's business: HF_TOKEN or `hf auth login`; a token is never asked for here.

Names of huggingface_hub are written out where they are used: its client takes as long to import as all else of a dry run.
"""

import logging
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub
from huggingface_hub import errors as hub_errors
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # documented, but not in an __all__

from .errors import HubError
from .report import PLAN_FILE

log = logging.getLogger(__name__)

HUBS_OWN = ".gitattributes"  # written when a repository is created; a repository with nothing else is empty
NEVER_PUSHED = {".git", ".cache"}  # what git and huggingface_hub keep beside files; the Hub refuses them


def check_push(repo_id: str, *, public: bool = False, overwrite: bool = False) -> str | None:
    """Raises HubError unless a folder may be pushed under this name; to be called before hours of work, changes nothing.

    Returns:
        The commit that the push would follow; None where there is no such repository yet.
    """
    return _look(repo_id, public, overwrite)[0]


def push_folder(folder: Path, repo_id: str, *, public: bool = False, overwrite: bool = False) -> str:
    """Uploads a model folder to the Hub repository `repo_id` in one commit and returns the repository's address.

    Args:
        folder: a folder that is whole, such as `merge_checkpoint` leaves; all its files are pushed, and nothing in it changes.
        repo_id: `USER/NAME`, of yours or an organisation's; created where it does not exist. An empty one is filled.
        public: everybody may read it. A repository that exists keeps its visibility: one of the other kind is refused.
        overwrite: replace what an earlier push of this program put there; files that the folder has not are deleted in the
            same commit (the repository's history keeps them).

    Raises:
        HubError: no login, no network, a repository that is not to be replaced, or a failed upload; the folder is whole in
            every case, and after a failed upload the message has the command that tries again.
    """
    if not (folder / "config.json").is_file():
        raise HubError(f"{folder} holds no config.json, so it is not a model folder; nothing was pushed")
    parent, there = _look(repo_id, public, overwrite)
    files = _files(folder)
    adds = [huggingface_hub.CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in files.items()]
    gone = [huggingface_hub.CommitOperationDelete(name) for name in sorted(there - files.keys())]
    api = huggingface_hub.HfApi(token=True)
    failed = f"{folder} is whole, but pushing it to {repo_id} failed"
    log.info("pushing %d files to %s", len(adds), repo_id)
    with _one_line(failed, f"try again with: {retry_command(folder, repo_id, public=public, overwrite=overwrite)}"):
        if parent is None:
            api.create_repo(repo_id, private=not public)
        commit = api.create_commit(
            repo_id, [*adds, *gone], commit_message="Upload a model made by layerfuse", parent_commit=parent
        )
        found = api.list_repo_tree(repo_id, recursive=True, revision=commit.oid)
        sizes = {entry.path: getattr(entry, "size", None) for entry in found}  # folders have none
        wrong = sorted(name for name, path in files.items() if sizes.get(name) != path.stat().st_size)
        if wrong:
            raise HubError(f"{failed}: {', '.join(wrong)} did not arrive whole; look at {api.endpoint}/{repo_id}")
    return f"{api.endpoint}/{repo_id}"


def retry_command(folder: Path, repo_id: str, *, public: bool = False, overwrite: bool = False) -> str:
    """The command of huggingface_hub that pushes `folder` again, as one would type it."""
    command = ["hf", "upload", repo_id, str(folder), ".", "--no-private" if public else "--private"]
    return shlex.join([*command, "--delete", "*"] if overwrite else command)


def _look(repo_id: str, public: bool, overwrite: bool) -> tuple[str | None, set[str]]:
    """The last commit and the files of a repository that may be pushed to; (None, none) where there is none yet."""
    try:
        validate_repo_id(repo_id)
    except hub_errors.HFValidationError as error:
        raise HubError(f"{repo_id!r} cannot name a repository: {error}") from error
    if repo_id.count("/") != 1:
        raise HubError(f"{repo_id!r} cannot name a repository to push to; expected USER/NAME")
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        raise HubError("HF_HUB_OFFLINE is set, so nothing can be pushed; unset it, or push later with 'hf upload'")
    api = huggingface_hub.HfApi(token=True)
    if huggingface_hub.get_token() is None:
        raise HubError("you are not logged in to the Hub; log in with 'hf auth login', or set HF_TOKEN")
    with _one_line(f"cannot push to {repo_id}"):
        _check_rights(repo_id, api)
        try:
            info = api.model_info(repo_id)
        except hub_errors.RepositoryNotFoundError:
            return None, set()
    files = {sibling.rfilename for sibling in info.siblings or []} - {HUBS_OWN}
    if info.private is public:
        is_, flag = ("private", "without --public") if public else ("public", "with --public")
        raise HubError(
            f"{repo_id} exists and is {is_}; push {flag}, change it in its settings on the Hub, or choose another name"
        )
    if files and not overwrite:
        raise HubError(f"{repo_id} exists and is not empty; choose another name, or replace its files with --overwrite")
    if files and PLAN_FILE not in files:
        raise HubError(f"{repo_id} holds no {PLAN_FILE}, so this program did not write it; choose another name")
    return info.sha, files


def _check_rights(repo_id: str, api: "huggingface_hub.HfApi") -> None:
    """Refuses what the login says beforehand; whether an organisation lets its member write shows only at the push."""
    me = api.whoami()
    names = [me["name"], *(organisation["name"] for organisation in me.get("orgs") or [])]
    owner = repo_id.partition("/")[0]
    if owner.casefold() not in {name.casefold() for name in names}:
        raise HubError(f"cannot push to {repo_id}: your login may write to {', '.join(names)}, not to {owner}")
    if ((me.get("auth") or {}).get("accessToken") or {}).get("role") == "read":
        raise HubError(f"cannot push to {repo_id}: your token may only read; log in with one that may write: 'hf auth login'")


def _files(folder: Path) -> dict[str, Path]:
    """What is pushed, by its name in the repository."""
    names = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {name.as_posix(): folder / name for name in names if not NEVER_PUSHED & set(name.parts)}


@contextmanager
def _one_line(said: str, then: str | None = None) -> Iterator[None]:
    """Has whatever goes wrong on the way to the Hub end as one line: `said`, the reason, and what to do `then`."""
    try:
        yield
    except HubError:
        raise
    except Exception as error:  # httpx's, xet's and many builtins, most of them undocumented
        raise HubError("; ".join(part for part in (f"{said}: {_why(error)}", then) if part)) from error


def _why(error: BaseException) -> str:
    """The reason in one line."""
    if isinstance(error, RuntimeError) and error.__cause__ is not None:  # "Error while uploading": the cause has the reason
        return _why(error.__cause__)
    if isinstance(error, hub_errors.HfHubHTTPError):
        status = error.response.status_code
        if status == 401:
            return "the login is not valid; log in again with 'hf auth login', or mend HF_TOKEN, which goes first"
        if error.server_message:
            return f"the Hub says {' '.join(error.server_message.split())} ({status})"
    elif type(error).__module__.startswith("httpx"):  # of whichever release huggingface_hub uses
        return f"the Hub at {huggingface_hub.constants.ENDPOINT} cannot be reached ({type(error).__name__})"
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
