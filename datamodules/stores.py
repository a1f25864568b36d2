"""Where a streamed corpus lies: a data set repository on the Hugging Face hub, or a folder that mirrors one.

Both list their files and give any range of bytes of one; nothing is ever downloaded whole. What goes wrong on
the way is retried with growing pauses, counted in `faults` and logged once of each kind.
"""

import json
import logging
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from filelock import FileLock

from datamodules.documents import Damage
from datamodules.folders import files_below
from datamodules.system_faults import named
from t6_lightning.common.errors import BadInput, SourceUnavailable, first_line
from t6_lightning.common.files import write_atomically
from t6_lightning.common.home import t6_home
from t6_lightning.common.secrets import hide_password

log = logging.getLogger(__name__)

PATIENCE_SECONDS = 900.0
"""How long one read is retried before the run stops."""
FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 60.0

faults: Counter[str] = Counter()
"""kind of passing fault -> how often this process met it."""
damage: Damage = Counter()
"""What of stored data this process had to leave out. By place: another process may meet the same."""


background = threading.local()
"""`background.stop`: an Event of the present thread that ends its waiting for a hub that is away."""


counting = threading.Lock()
"""Held while what was met is looked up and counted: several threads read at once."""
# A process must not be forked while another thread holds it: it would have no one to let go.
os.register_at_fork(
    before=counting.acquire, after_in_parent=counting.release, after_in_child=counting.release
)


def count_fault(kind: str, where: str) -> None:
    """Count a passing fault; the first of each kind is logged."""
    with counting:
        new = kind not in faults
        faults[kind] += 1
    if new:
        _tell(kind, where)


def count_damage(kind: str, place: str, times: int) -> None:
    """Count what is left out of stored data; the first of each kind is logged."""
    with counting:
        new = all(kind != known for known, _ in damage)
        damage[kind, place] += times
    if new:
        _tell(kind, place)


def _tell(kind: str, where: str) -> None:
    log.warning("%s: %s (further ones of this kind are only counted).", where, kind)


LOCAL = "local"
"""The revision of a folder."""


class StoredFile(NamedTuple):
    path: str
    """Relative to the store, with /."""
    size: int
    """Bytes as stored."""
    content: str
    """Changes whenever the bytes do: the hub's hash, or a local file's place and time of change."""


class Store(Protocol):
    name: str
    """Repository or folder, for messages."""
    revision: str
    """Commit on the hub; LOCAL for a folder."""

    def files(self, patterns: list[str]) -> list[StoredFile]:
        """The files whose path matches a pattern (* also matches /), sorted by path. Raises BadInput."""
        ...

    def read(self, file: StoredFile, begin: int, end: int) -> bytes:
        """Bytes begin .. end - 1 of a file, all of them. Raises BadInput, SourceUnavailable."""
        ...


class Folder:
    """A local mirror."""

    revision = LOCAL

    def __init__(self, path: str):
        self.root = Path(path).expanduser().absolute()
        self.name = str(self.root)
        if not self.root.is_dir():
            raise BadInput(f"path: there is no folder {path!r}.")

    def files(self, patterns: list[str]) -> list[StoredFile]:
        found = []
        for file in files_below(self.root):
            path = file.relative_to(self.root).as_posix()
            if any(fnmatch(path, pattern) for pattern in patterns):
                with named(str(file)):
                    stat = file.stat()
                found.append(StoredFile(path, stat.st_size, f"{file} {stat.st_mtime_ns}"))
        return sorted(found)

    def read(self, file: StoredFile, begin: int, end: int) -> bytes:
        with named(f"{self.name}/{file.path}"), open(self.root / file.path, "rb") as opened:
            opened.seek(begin)
            data = opened.read(end - begin)
        if len(data) != min(end, file.size) - begin:
            raise BadInput(f"{self.root / file.path} was changed or cut while it was read.")
        return data


class Hub:
    """A data set repository on the hub that HF_ENDPOINT names, read with the token that HF_TOKEN holds.

    Args:
        repository: "owner/name".
        revision: Branch, tag or commit. A branch or tag is looked up once and kept in T6_HOME, so that all
            runs there read the same commit.
        patience: Seconds that one read is retried before SourceUnavailable.
    """

    def __init__(self, repository: str, revision: str = "main", patience: float = PATIENCE_SECONDS):
        self.name, self.patience = repository, patience
        for library in ("httpx", "httpx2"):  # they log every address, and addresses hold signatures
            logging.getLogger(library).setLevel(logging.WARNING)
        self.folder = t6_home() / "hub" / repository.replace("/", "--")
        self.revision = revision if _is_commit(revision) else self._pinned(revision)

    @property
    def endpoint(self) -> str:
        return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")

    @property
    def _shown(self) -> str:
        """The endpoint as messages may say it: an address may hold a password."""
        return hide_password(self.endpoint)

    def files(self, patterns: list[str]) -> list[StoredFile]:
        listed = {file for pattern in patterns for file in self._tree(_fixed_folder(pattern))}
        return sorted(file for file in listed if any(fnmatch(file.path, pattern) for pattern in patterns))

    def read(self, file: StoredFile, begin: int, end: int) -> bytes:
        from huggingface_hub import hf_hub_url

        url = hf_hub_url(
            self.name, file.path, repo_type="dataset", revision=self.revision, endpoint=self.endpoint
        )
        end = min(end, file.size)
        data = bytearray()
        if end > begin:
            self._retried(lambda: self._receive(url, file, begin, end, data), f"{self.name}/{file.path}")
        return bytes(data)

    def _receive(self, url: str, file: StoredFile, begin: int, end: int, data: bytearray) -> None:
        """Append to `data` what is still missing of the range; what came before a fault is kept."""
        from huggingface_hub import constants, get_session
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

        start = begin + len(data)
        headers = {**build_hf_headers(), "Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT  # without a byte
        with get_session().stream("GET", url, headers=headers, timeout=timeout) as response:
            if response.status_code >= 400:
                response.read()
            hf_raise_for_status(response)
            skip = 0
            if response.status_code == 200:  # the server ignores ranges
                skip = start
            elif (span := response.headers.get("Content-Range", "")) and not span.startswith(
                f"bytes {start}-"
            ):
                raise _Faulty(f"the hub answers another range ({span})")
            for chunk in response.iter_raw():
                passed = min(skip, len(chunk))
                skip -= passed
                data += chunk[passed : passed + end - begin - len(data)]
                if len(data) == end - begin:
                    return
        raise _Faulty("the answer is cut short")

    def _pinned(self, name: str) -> str:
        """The commit that a branch or tag had when it was first asked for."""
        pin = self.folder / "revisions" / f"{name.replace('/', '--')}"
        pin.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(pin.with_name(f"{pin.name}.lock")):
            if pin.is_file() and _is_commit(commit := pin.read_text().strip()):
                return commit
            commit = self._json(f"/revision/{name}")[0]["sha"]
            write_atomically(pin, commit + "\n")
        log.info("%s: revision %s is %s; it is kept in %s.", self.name, name, commit, pin)
        return commit

    def _tree(self, folder: str) -> list[StoredFile]:
        """All files in a folder of the repository, kept on disk: a commit does not change."""
        kept = self.folder / self.revision / f"{folder.replace('/', '--') or 'all'}.json"
        try:
            return [StoredFile(*entry) for entry in json.loads(kept.read_text(encoding="utf-8"))]
        except (OSError, ValueError, TypeError):
            pass
        listed = []
        page = f"/tree/{self.revision}{'/' + folder if folder else ''}?recursive=true"
        while page:
            try:
                entries, page = self._json(page)
            except _NotThere:  # the revision has no such folder
                break
            for entry in entries:
                if entry["type"] == "file":
                    lfs = entry.get("lfs") or {}
                    content = lfs.get("oid") or lfs.get("sha256") or entry["oid"]
                    listed.append(StoredFile(entry["path"], lfs.get("size") or entry["size"], content))
        write_atomically(kept, json.dumps(listed))
        return listed

    def _json(self, path: str) -> tuple[Any, str | None]:
        """The hub's answer about this repository, and the address of the next page."""
        from huggingface_hub import constants, get_session
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

        api = f"{self.endpoint}/api/datasets/{self.name}"
        url = path if path.startswith("http") else api + path
        answer: list[tuple[Any, str | None]] = []

        def ask() -> None:
            timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
            response = get_session().get(url, headers=build_hf_headers(), timeout=timeout)
            hf_raise_for_status(response)
            try:
                answer.append((response.json(), response.links.get("next", {}).get("url")))
            except ValueError:
                raise _Faulty("the answer is no JSON") from None

        self._retried(ask, self.name)
        return answer[0]

    def _retried(self, attempt: Callable[[], None], what: str) -> None:
        give_up = time.monotonic() + self.patience
        pause = FIRST_PAUSE_SECONDS
        while True:
            try:
                return attempt()
            except Exception as error:
                kind = self._fault(error, what)
                wait = min(_asked_pause(error) or pause * random.uniform(0.75, 1.25), LONGEST_PAUSE_SECONDS)
                if time.monotonic() + wait > give_up:
                    raise SourceUnavailable(
                        f"{self._shown} has not given {what} for {self.patience:,.0f} s (last: {kind}); nothing "
                        "is lost: the same command goes on where it stopped, in training from the last checkpoint."
                    ) from None
                count_fault(kind, what)
            stop = getattr(background, "stop", None)
            if stop is None:
                time.sleep(wait)
            elif stop.wait(wait):
                raise SourceUnavailable(f"Nobody waits for {what} any more.") from None
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    def _fault(self, error: Exception, what: str) -> str:
        """What kind of passing fault this is. Raises BadInput for one that trying again does not cure.

        Messages of the HTTP library hold addresses, and addresses may hold signatures: they are not repeated.
        """
        from huggingface_hub import errors, get_token

        page = f"{self._shown}/datasets/{self.name}"
        if isinstance(error, _Faulty):
            return str(error)
        if isinstance(error, errors.OfflineModeIsEnabled):
            raise BadInput(
                f"{what} is not on this machine, and HF_HUB_OFFLINE forbids to ask the hub."
            ) from None
        if isinstance(error, errors.GatedRepoError):
            say = "HF_TOKEN is not set" if get_token() is None else "the token in HF_TOKEN has not done so"
            raise BadInput(
                f"repository: {self.name!r} is gated: its terms must be accepted at {page}, and {say}."
            ) from None
        if isinstance(error, errors.RevisionNotFoundError):
            raise BadInput(f"revision: {self.name!r} has none of that name.") from None
        if isinstance(error, errors.EntryNotFoundError):
            raise _NotThere(f"{what} is not in revision {self.revision} of the repository.") from None
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status == 401 and get_token() is not None:
            raise BadInput(
                f"HF_TOKEN: {self._shown} refuses the token (or there is no repository {self.name!r})."
            ) from None
        if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 404):
            raise BadInput(
                f"repository: {self._shown} has no data set {self.name!r}, or it is private and HF_TOKEN holds "
                "no token that may read it."
            ) from None
        if status == 403:
            raise BadInput(
                f"HF_TOKEN: {self._shown} does not let it read {self.name!r} (HTTP 403)."
            ) from None
        # 416: the file is shorter there than the listing says, as while a server is being filled.
        if status is not None and status not in (408, 416, 429) and status < 500:
            raise BadInput(f"{what}: {self._shown} answers HTTP {status}.") from None
        if status is not None:
            return f"the hub answers HTTP {status}"
        name = type(error).__name__
        if not (isinstance(error, OSError) or type(error).__module__.startswith(("httpx", "httpcore"))):
            raise error
        if "Timeout" in name or isinstance(error, TimeoutError):
            return "the hub stalls"
        if name in ("InvalidURL", "UnsupportedProtocol", "LocalProtocolError"):
            raise BadInput(f"HF_ENDPOINT: {self._shown!r} cannot be asked: {first_line(error)}.") from None
        return "the connection to the hub is dropped or refused"


class _NotThere(BadInput):
    """The revision has no such file or folder."""


class _Faulty(Exception):
    """An answer that is not what was asked for."""


def open_store(repository: str, revision: str, path: str | None, patience: float) -> Store:
    """The folder `path` if there is one, else the repository on the hub."""
    return Hub(repository, revision, patience) if path is None else Folder(path)


def _is_commit(revision: str) -> bool:
    return len(revision) == 40 and set(revision) <= set("0123456789abcdef")


def _fixed_folder(pattern: str) -> str:
    """The folder in front of a pattern's first magic character: "sample/10BT/*" -> "sample/10BT"."""
    fixed = []
    for part in pattern.split("/")[:-1]:
        if any(character in part for character in "*?["):
            break
        fixed.append(part)
    return "/".join(fixed)


def _asked_pause(error: Exception) -> float | None:
    """Seconds that the hub asks to wait (Retry-After)."""
    asked = getattr(getattr(error, "response", None), "headers", {}).get("Retry-After", "")
    return float(asked) if asked.isdigit() else None
