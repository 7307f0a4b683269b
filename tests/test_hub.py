"""Names on the Hub become commits, once. The Hub itself is not asked: its client's two questions are stood in for, so that a
change of what it raises or of its arguments' names is not noticed here."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest

from s2l_ray.config import RunConfig
from s2l_ray.errors import ConfigError, DataError
from s2l_ray.storage.hub import hub_commit, resolve_revisions
from s2l_ray.storage.layout import SCHEMA
from s2l_ray.storage.places import Storage

COMMIT, OTHER = "0123456789" * 4, "abcdef0123" * 4


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, str | None]]:
    """What the Hub was asked; it knows everything, and all is at one commit."""
    questions: list[tuple[str, str, str | None]] = []

    def answer(kind: str) -> Any:
        def info(_: Any, name: str, *, revision: str | None, timeout: float) -> Any:
            assert timeout
            questions.append((kind, name, revision))
            return SimpleNamespace(sha=COMMIT)

        return info

    for kind in ("model", "dataset"):
        monkeypatch.setattr(huggingface_hub.HfApi, f"{kind}_info", answer(kind))
    return questions


def refuse(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def info(*_: Any, **__: Any) -> Any:
        raise error

    for kind in ("model", "dataset"):
        monkeypatch.setattr(huggingface_hub.HfApi, f"{kind}_info", info)


def not_found(kind: type[Exception]) -> Exception:
    return kind("404 Client Error", response=SimpleNamespace(headers={}, request=None))  # type: ignore[call-arg]


def config_of(**sections: Any) -> RunConfig:
    rest = {"examples": {"dataset": "org/data"}, "proxy": {"model": "org/small"}, "target": {"model": "org/large"}}
    return RunConfig(**{"name": "r", "selection": {"budget": 1}} | rest | sections)


def test_names_on_the_hub_are_pinned_to_commits(asked, tmp_path):
    config = resolve_revisions(config_of(proxy={"model": "org/small", "revision": "main"}), Storage(str(tmp_path)))
    assert [config.examples.revision, config.proxy.revision, config.target.revision] == [COMMIT] * 3
    assert asked == [("dataset", "org/data", None), ("model", "org/small", "main"), ("model", "org/large", None)]


def test_what_a_run_pinned_before_stays_though_a_branch_moves(asked, tmp_path):
    run, other = Storage(str(tmp_path / "run")), Storage(str(tmp_path / "other"))
    old = config_of(proxy={"model": "org/small", "revision": OTHER}, examples={"dataset": "org/else", "revision": OTHER})
    other.write_json("run.json", {"schema": SCHEMA, **old.model_dump(mode="json")})
    config = resolve_revisions(config_of(target={"model": str(tmp_path)}), run, other)
    assert config.proxy.revision == OTHER
    assert config.examples.revision == COMMIT, "that was another dataset"
    assert config.target.revision is None, "a path has no commit"
    assert asked == [("dataset", "org/data", None)]


def test_a_commit_needs_no_network(monkeypatch):
    refuse(monkeypatch, ConnectionError("no network"))
    assert hub_commit("dataset", "org/data", COMMIT) == COMMIT


@pytest.mark.parametrize("kind", ["model", "dataset"])
def test_a_name_or_revision_that_the_hub_does_not_know_is_refused_by_name(monkeypatch, kind):
    refuse(monkeypatch, not_found(huggingface_hub.errors.RepositoryNotFoundError))
    with pytest.raises(ConfigError, match=rf"'org/none': no such path here, and no {kind} of the Hub .*HF_TOKEN"):
        hub_commit(kind, "org/none", None)
    refuse(monkeypatch, not_found(huggingface_hub.errors.RevisionNotFoundError))
    with pytest.raises(ConfigError, match="'org/none': the Hub has no revision 'v9' of it"):
        hub_commit(kind, "org/none", "v9")


def test_where_the_hub_does_not_answer_nothing_is_pinned_and_a_warning_says_so(monkeypatch, tmp_path, caplog):
    refuse(monkeypatch, ConnectionError("no network\nmore"))
    config = config_of(proxy={"model": "org/small", "revision": "main"})
    assert resolve_revisions(config, Storage(str(tmp_path))) == config
    assert "not pinned to a commit: org/small: no such path here, and the Hub does not answer (no network)." in caplog.text
    with pytest.raises(DataError, match=r"org/data: .*the Hub does not answer \(no network\)"):
        hub_commit("dataset", "org/data", None)
