from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.store_contract import StoreContract
from tilecast.cache_store.memory import MemoryStore
from tilecast.store import Store


class TestMemoryStore(StoreContract):
    @pytest.fixture
    def store(self) -> Iterator[Store]:
        with MemoryStore() as store:
            yield store
