"""Checkpoints and adapters that were damaged, loaded in a process of its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from .examples import examples
from .isolated import Isolated

pytest.importorskip("peft", reason="needs peft and safetensors (pip install 'memsave[hf]')")
damage = pytest.importorskip("tests.fuzz.damage")
loading = pytest.importorskip("tests.fuzz.loading")
CHECKPOINTS, ADAPTERS = loading.CHECKPOINTS, loading.ADAPTERS


@pytest.fixture(scope="module")
def isolated() -> Iterator[Isolated]:
    process = Isolated()
    yield process
    process.close()


@pytest.mark.parametrize("kind", CHECKPOINTS)
@examples(30)
@given(data=st.data())
def test_checkpoints(kind: str, data: st.DataObject, isolated: Isolated) -> None:
    files = damage.damaged(data.draw, loading.checkpoint(kind))
    isolated.call("tests.fuzz.loading:load_checkpoint", kind, files, data.draw(st.booleans()))


@pytest.mark.parametrize("kind", ADAPTERS)
@examples(30)
@given(data=st.data())
def test_adapters(kind: str, data: st.DataObject, isolated: Isolated) -> None:
    isolated.call("tests.fuzz.loading:load_adapter", damage.damaged(data.draw, loading.adapter(kind)))


@pytest.mark.parametrize("kind", ["shira", "lamda"])
@examples(20)
@given(data=st.data())
def test_adapters_by_peft(kind: str, data: st.DataObject, isolated: Isolated) -> None:
    isolated.call("tests.fuzz.loading:load_by_peft", damage.damaged(data.draw, loading.adapter(kind)))


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_what_is_not_damaged_is_loaded(kind: str, isolated: Isolated) -> None:
    """A test of the test: an error would not be noticed otherwise."""
    isolated.call("tests.fuzz.loading:load_checkpoint", kind, loading.checkpoint(kind))
    for name in ADAPTERS:
        isolated.call("tests.fuzz.loading:load_adapter", loading.adapter(name))
