"""Pushes a version of an export to a dataset repository of the Hugging Face Hub.

It needs the extra ``hub``, and a token where ``huggingface_hub`` looks for one: ``HF_TOKEN``, or
what ``hf auth login`` stored. What the repository has already is not sent again.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

from krea_dagster.curation.export.folder import TABLES
from krea_dagster.curation.export.spec import ExportSpec
from krea_dagster.errors import ConfigError, StorageError

_NAME: Final = re.compile(r"[\w.-]+/[\w.-]+")

#: Files of earlier versions, which a push removes unless the new version has them too. Others, such
#: as a licence that someone added, stay.
_OF_EXPORTS: Final = [
    "data/*-[0-9][0-9][0-9][0-9][0-9].parquet",
    "data/*-[0-9][0-9][0-9][0-9][0-9].tar",
    "*/[0-9][0-9][0-9][0-9][0-9]/*",
    TABLES["imagefolder"].format(split="*"),
]


@dataclass(frozen=True)
class Pushed:
    """A version in a repository. Without ``is_new`` the repository had it already."""

    repository: str
    url: str
    commit: str
    is_new: bool


class HubRepository:
    """A dataset repository of the Hub, such as ``ada/boats``.

    It is private unless it is ``public``; the visibility of a repository that exists stays.

    Raises:
        ConfigError: The name is none, or the library or a token is missing.
    """

    def __init__(self, name: str, *, public: bool = False) -> None:
        if not _NAME.fullmatch(name):
            raise ConfigError(f"{name!r} is not a repository of the Hub: use OWNER/NAME")
        try:
            import huggingface_hub  # noqa: PLC0415 - an extra
            from huggingface_hub.utils.tqdm import disable_progress_bars  # noqa: PLC0415
        except ImportError:
            raise ConfigError(
                "a push needs the extra hub: pip install 'krea-dagster[hub]'"
            ) from None
        self._token = huggingface_hub.get_token()
        if self._token is None:
            raise ConfigError(
                "a push needs a token of the Hugging Face Hub that may write: set HF_TOKEN, or run "
                "`hf auth login`"
            )
        self.name = name
        self._public = public
        self._api: Any = huggingface_hub.HfApi()
        # It would show a bar for each file.
        disable_progress_bars()

    @classmethod
    def of(cls, spec: ExportSpec, to: str) -> HubRepository:
        """Return the repository of an export to a folder. Raises ConfigError."""
        if "://" in to:
            raise ConfigError("only an export to a folder can be pushed to the Hub")
        return cls(spec.push or "", public=spec.public)

    def push(self, folder: str, version: str, splits: Iterable[str]) -> Pushed:
        """Push the folder of a version. Raises StorageError; then the repository is unchanged."""
        about = {"repo_id": self.name, "repo_type": "dataset"}
        tables = [TABLES[form].format(split=one) for form in TABLES for one in splits]
        try:
            self._api.create_repo(**about, private=not self._public, exist_ok=True)
            before = self._api.repo_info(**about).sha
            commit = self._api.upload_folder(
                **about,
                folder_path=folder,
                commit_message=f"Export {version}",
                delete_patterns=[*_OF_EXPORTS, *tables],
            )
        except Exception as error:  # noqa: BLE001 - its HTTP client has errors of its own
            causes = dict.fromkeys(str(one).strip() for one in (error, error.__cause__) if one)
            said = ": ".join(causes).replace(str(self._token), "…")
            raise StorageError(
                f"the push to the Hub's {self.name} failed, and it has its earlier files: {said} "
                f"The export is in {folder}; the same command pushes it again."
            ) from None
        url = f"{self._api.endpoint}/datasets/{self.name}"
        return Pushed(self.name, url, commit.oid, is_new=commit.oid != before)
