"""The Hub: looked up within a deadline, whatever the server does, and what it refuses in one sentence."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import GatedRepoError

from quantbench.settings import MODELS, unknown
from quantbench.weights import TOKENIZERS, NoHub
from quantbench.wording import cut

PATIENCE_S = 10.0  # for all that is asked before a download
SILENT_S = 60.0  # how long a Hub that could not be reached is not asked again
REFUSALS = {
    401: "the Hub does not take the token for {!r} (HF_TOKEN, or `hf auth login`), or has no such model",
    403: "{!r} is gated: accept its licence on the Hub and log in, then try again",
    404: "the Hub has no {!r}",
    429: "the Hub had too many requests and did not look up {!r}: wait, or log in"}
_CONFIG = ["config.json", "generation_config.json", "adapter_config.json", *TOKENIZERS]
_WEIGHTS = ["model.safetensors*", "model-*.safetensors"]  # never pickle, nor another library's names
_silent: dict[str, tuple[float, str]] = {}  # address -> until when it is not asked, and why


def snapshot(name: str, repo: str, config_alone: bool) -> tuple[Path, OSError | ValueError | None]:
    """The folder of a repository, downloaded, or as the local cache holds it where the Hub gives no answer of use; then
    with the reason, which is raised (NoHub or ValueError) where the cache holds nothing."""
    commit = why = None
    try:
        commit = ask(lambda: HfApi().model_info(repo).sha)
    except NoHub as error:
        why = error
    except OSError as error:
        status = 403 if isinstance(error, GatedRepoError) else error.response.status_code
        said = REFUSALS.get(status, f"the Hub answers {status} for {{!r}}").format(repo)
        why = ValueError(said if status != 404 or name in MODELS else f"{unknown('model', name, MODELS)} {said}")
    files = _CONFIG if config_alone else _CONFIG + _WEIGHTS
    try:
        folder = snapshot_download(repo, revision=commit, allow_patterns=files, local_files_only=commit is None)
    except Exception as error:  # of HTTP, of the disk, of the cache
        raise why or ValueError(f"{repo!r} could not be downloaded: {cut(error, 200)}") from None
    return Path(folder), why


def ask(work: Callable) -> object:
    """What `work` gets from the Hub. Raises NoHub for no answer in time, OSError with a `response` for a refusal."""
    until, why = _silent.get(constants.ENDPOINT, (0.0, ""))
    if constants.HF_HUB_OFFLINE or time.monotonic() < until:
        raise NoHub("HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else why)
    answer: Future = Future()
    threading.Thread(target=_settle, args=(answer, work), daemon=True).start()  # it may wait for ever
    try:
        return answer.result(PATIENCE_S)
    except TimeoutError:
        why = f"the Hub gave no whole answer within {PATIENCE_S:g} s"
    except Exception as error:  # of HTTP, of the socket, of JSON
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status and status != 407 and status < 500:
            raise
        no_json = isinstance(error, (ValueError, LookupError, TypeError, AttributeError)) and not status
        why = "something else than the Hub answers, such as a network's sign-in page" if no_json else \
            f"the Hub cannot be reached ({status or cut(error, 100)})"
    _silent[constants.ENDPOINT] = time.monotonic() + SILENT_S, why
    raise NoHub(why)


def _settle(answer: Future, work: Callable) -> None:
    try:
        answer.set_result(work())
    except BaseException as error:
        answer.set_exception(error)
