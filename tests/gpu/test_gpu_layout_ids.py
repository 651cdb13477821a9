"""Which pools store interchangeable bytes, and the geometry of known models."""

from __future__ import annotations

import numpy as np

from kvtier.gpu.describe import contiguous, paged
from kvtier.testing.pool_cases import (
    BLOCK,
    across,
    across_layer_outermost,
    across_token_outside,
    across_views,
    heads_outside,
    kv_in_page,
    kv_outside,
    latent,
    separate_k_v,
    sequence,
    two_groups,
)


def test_interchangeable_layouts_have_one_id() -> None:
    geometry = ("uint16", 4, 2, 8)
    assert separate_k_v(*geometry).layout.layout_id == kv_outside(*geometry).layout.layout_id
    assert heads_outside(*geometry).layout.layout_id == across_layer_outermost(*geometry).layout.layout_id
    other_pages = np.zeros((10, 8, 2, 8), np.uint16)
    same = paged([(other_pages, other_pages)] * 4, "page token head dim", block_tokens=BLOCK)
    assert same.layout_id == separate_k_v(*geometry).layout.layout_id
    block_pages = np.zeros((10, 3, BLOCK, 8), np.uint16)
    by_block = paged([(block_pages, block_pages)] * 2, "page head token dim", block_tokens=BLOCK)
    assert by_block.layout_id == contiguous(sequence((5, 5), 0), block_tokens=BLOCK).layout_id


def test_layouts_that_differ_have_other_ids() -> None:
    kinds = [
        separate_k_v,
        kv_in_page,
        heads_outside,
        latent,
        across,
        across_token_outside,
        across_views,
        two_groups,
    ]
    ids = [build("uint16", 4, 2, 8).layout.layout_id for build in kinds]
    ids.append(separate_k_v("float32", 4, 2, 8).layout.layout_id)
    ids.append(separate_k_v("uint16", 4, 4, 8).layout.layout_id)
    page8 = np.zeros((10, 2, 8, 2, 8), np.uint16)
    ids.append(paged([(page8,)] * 4, "page kv token head dim", block_tokens=BLOCK).layout_id)
    ids.append(contiguous(sequence((5, 5), 0), block_tokens=BLOCK).layout_id)
    assert len(set(ids)) == len(ids)


def test_geometry_of_known_models() -> None:
    bf16 = np.zeros((2, 16, 8, 128), np.uint16)
    llama = paged([(bf16, bf16)] * 32, "page token head dim", block_tokens=256)
    assert llama.geometry.token_bytes == 131_072
    assert (llama.geometry.block_tokens, llama.geometry.page_tokens) == (256, 16)
    mla = np.zeros((2, 16, 576), np.uint16)
    deepseek = paged([(mla,)] * 61, "page token dim", block_tokens=256)
    assert deepseek.geometry.token_bytes == 70_272
    with_groups = two_groups("uint16", 4, 2, 8).layout.geometry
    assert [(g.kind, g.window_tokens) for g in with_groups.groups] == [("full", 0), ("sliding", 8)]
