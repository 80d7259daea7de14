"""The builder: segments, positions and visibility of whole texts, against oracles."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_efficient.errors import UsageError
from hf_efficient.kernels.topology_attention.reference import visible_pairs
from hf_efficient.modeling.topology.errors import TopologyError
from hf_efficient.modeling.topology.grammar.builder import TopologyBuilder
from hf_efficient.modeling.topology.grammar.control_tokens import (
    CONTROL_TOKENS,
    MODES,
    control_token_ids,
    decode_function,
)
from hf_efficient.modeling.topology.grammar.topology import Topology

GRAMMARS = list(CONTROL_TOKENS)
TEXTS = 500


def parsed(toy: Callable, random_text: Callable, grammar: str, glue: bool | None = None) -> Iterator[tuple[Any, str]]:
    """Random texts and their topologies, every mode in turn."""
    vocabulary = toy(grammar)
    for seed in range(TEXTS):
        text = random_text(grammar, seed, seed % 2 == 0 if glue is None else glue)
        yield vocabulary.parse(text, mode=MODES[seed % 3]), text


@pytest.mark.parametrize("grammar", GRAMMARS)
def test_masks_and_positions_are_those_of_the_definition(
    grammar: str, toy: Callable, random_text: Callable, by_hand: Callable, positions_by_hand: Callable
) -> None:
    for topology, text in parsed(toy, random_text, grammar):
        mask = by_hand(topology)
        assert np.array_equal(topology.dense_mask().numpy(), mask), text
        assert np.array_equal(topology.position_ids, positions_by_hand(topology)), text


@pytest.mark.parametrize("grammar", GRAMMARS)
def test_the_kernels_read_the_bitmaps_as_defined(
    grammar: str, toy: Callable, random_text: Callable, by_hand: Callable
) -> None:
    for seed in range(20):
        topology = toy(grammar).parse(random_text(grammar, seed, True))
        batch = Topology.stack([topology])
        visible = visible_pairs(batch.segment_ids, batch.segment_visibility)[0]
        assert np.array_equal(visible.numpy(), by_hand(topology))


@pytest.mark.parametrize("grammar", GRAMMARS)
def test_a_token_sees_only_earlier_ones(grammar: str, toy: Callable, random_text: Callable, by_hand: Callable) -> None:
    """Otherwise a causal layout would hide a part of an ancestor."""
    for topology, text in parsed(toy, random_text, grammar):
        segments = topology.segment_ids
        for segment in range(topology.n_segments):
            first = np.flatnonzero(segments == segment)[0]
            for ancestor in range(segment):
                if topology.reachable(segment, ancestor):
                    assert np.flatnonzero(segments == ancestor)[-1] < first, text


def released_multiverse_mask(ids: list[int], tags: dict[str, int]) -> np.ndarray:
    """The released training rule: causal, less every pair of path spans of a block, in both directions."""
    mask = np.tri(len(ids), dtype=bool)
    blocks: list[list[list[int]]] = []
    for i, token in enumerate(ids):
        if token == tags["<Parallel>"]:
            blocks.append([])
        elif token == tags["<Path>"]:
            blocks[-1].append([i, i])
        elif token == tags["</Path>"]:
            blocks[-1][-1][1] = i
        elif token == tags["</Parallel>"]:
            spans = [slice(first, last + 1) for first, last in blocks.pop()]
            for one in spans:
                for other in spans:
                    if one != other:
                        mask[one, other] = False
    return mask


def released_multiverse_positions(ids: list[int], tags: dict[str, int]) -> np.ndarray:
    """Paths begin after their block's goal, the conclusion after the longest path."""
    positions, position = [], 0
    blocks: list[list[int]] = []  # position of </Goal>, longest path so far, whether a path is open
    for token in ids:
        if token == tags["<Path>"]:
            position = blocks[-1][0] + 1
            blocks[-1][2] = 1
        elif token == tags["<Conclusion>"]:
            position = blocks[-1][0] + blocks[-1][1] + 1
        positions.append(position)
        if token == tags["<Parallel>"]:
            blocks.append([0, 0, 0])
        elif token == tags["</Goal>"]:
            blocks[-1][0] = position
        elif token == tags["</Path>"]:
            blocks[-1][1] = max(blocks[-1][1], position - blocks[-1][0])
            blocks[-1][2] = 0
        elif token == tags["</Parallel>"]:
            blocks.pop()
        position += 1
    return np.array(positions)


def test_multiverse_without_separators_is_the_released_training_rule(toy: Callable, random_text: Callable) -> None:
    vocabulary = toy("multiverse")
    for topology, text in parsed(toy, random_text, "multiverse", glue=False):
        ids = vocabulary.encode(text)
        assert np.array_equal(topology.dense_mask().numpy(), released_multiverse_mask(ids, vocabulary.token_ids)), text
        assert np.array_equal(topology.position_ids, released_multiverse_positions(ids, vocabulary.token_ids)), text


def test_with_separators_only_they_are_seen_less_than_in_the_released_rule(
    toy: Callable, random_text: Callable
) -> None:
    """There a separator between two paths is seen by the second, and sees the first: a leak."""
    vocabulary, leaks = toy("multiverse"), 0
    for topology, text in parsed(toy, random_text, "multiverse", glue=True):
        ids = vocabulary.encode(text)
        released = released_multiverse_mask(ids, vocabulary.token_ids)
        ours = topology.dense_mask().numpy()
        assert not (ours & ~released).any(), text
        newline = np.array(ids) == vocabulary.encode("\n")[0]
        differing = np.argwhere(released & ~ours)
        leaks += len(differing)
        assert all(newline[i] or newline[j] for i, j in differing), text
    assert leaks > TEXTS


def released_medverse_chunks(plan: dict[int, list[int]]) -> list[list[int]]:
    """Greedy: a step joins the chunk unless that has one of its dependencies."""
    chunks: list[list[int]] = []
    for number, needed in plan.items():
        if not chunks or set(needed) & set(chunks[-1]):
            chunks.append([])
        chunks[-1].append(number)
    return chunks


def step_spans(ids: list[int], tags: dict[str, int]) -> list[slice]:
    ends = [i + 1 for i, token in enumerate(ids) if token == tags["</Step>"]]
    return [slice(i, end) for i, end in zip((i for i, t in enumerate(ids) if t == tags["<Step>"]), ends, strict=True)]


def test_medverse_layers_are_the_released_training_mask(toy: Callable, random_text: Callable) -> None:
    """With the positions that were meant: the steps of a layer begin together, after the longest of the one before."""
    vocabulary, several = toy("medverse"), 0
    for seed in range(TEXTS):
        text = random_text("medverse", seed, False)
        ids = vocabulary.encode(text)
        builder = TopologyBuilder("medverse", vocabulary.token_ids, mode="layers", decode=vocabulary.decode)
        placed = builder.feed_many(ids)
        chunks = released_medverse_chunks(builder.plan)
        spans = dict(zip(builder.plan, step_spans(ids, vocabulary.token_ids), strict=True))
        released = np.tri(len(ids), dtype=bool)
        positions, anchor = np.arange(len(ids)), spans[1].start
        for chunk in chunks:
            for one in chunk:
                positions[spans[one]] = anchor + np.arange(spans[one].stop - spans[one].start)
                for other in chunk:
                    if one != other:
                        released[spans[one], spans[other]] = False
            anchor += max(spans[one].stop - spans[one].start for one in chunk)
        after = max(span.stop for span in spans.values())
        positions[after:] = anchor + np.arange(len(ids) - after)
        topology = vocabulary.parse_ids(ids, mode="layers")
        assert np.array_equal(topology.dense_mask().numpy(), released), text
        assert np.array_equal(placed.position_ids, positions), text
        several += len(chunks) > 1 and len(chunks) < len(builder.plan)
    assert several > TEXTS // 4


def test_modes_see_more_and_more(toy: Callable, random_text: Callable) -> None:
    """P6: what `dag` sees, `layers` sees, and that is causal; `flat` sees least."""
    vocabulary, strict = toy("medverse"), 0
    for seed in range(TEXTS // 2):
        text = random_text("medverse", seed, True)
        flat, dag, layers = (vocabulary.parse(text, mode=mode).dense_mask() for mode in ("flat", "dag", "layers"))
        assert not (flat & ~dag).any() and not (dag & ~layers).any() and not layers.triu(1).any()
        strict += not torch.equal(dag, layers)
    assert strict > 20


@pytest.mark.parametrize("grammar", GRAMMARS)
def test_the_last_position_is_the_longest_chain(grammar: str, toy: Callable, random_text: Callable) -> None:
    """P7."""
    for topology, text in parsed(toy, random_text, grammar):
        lengths = np.bincount(topology.segment_ids, minlength=topology.n_segments)
        longest: list[int] = []
        for segment, parents in enumerate(topology.parents):
            longest.append(int(lengths[segment]) + max((longest[parent] for parent in parents), default=0))
        assert topology.critical_path == max(longest) == topology.position_ids.max() + 1, text


def test_one_path_and_a_chain_of_steps_are_plain_causal_text(toy: Callable, plan_text: Callable) -> None:
    """P1."""
    one = (
        "ab<Parallel>\n<Goal>\n<Outline>1: x</Outline>\n</Goal>\n<Path>\n1: cd</Path>\n"
        "<Conclusion>e</Conclusion></Parallel>f"
    )
    chain = plan_text({1: [], 2: [1], 3: [2]})
    rows = [toy("multiverse").parse(one), *(toy("medverse").parse(chain, mode=mode) for mode in ("dag", "layers"))]
    for topology in rows:
        assert topology.n_segments > 2
        assert torch.equal(topology.dense_mask(), torch.ones(len(topology), len(topology)).tril().bool())
        assert np.array_equal(topology.position_ids, np.arange(len(topology)))


def test_more_segments_than_a_word_has_bits(toy: Callable, by_hand: Callable, positions_by_hand: Callable) -> None:
    labels = [str(i + 1) for i in range(70)]
    outlines = "".join(f"<Outline>{label}: x</Outline>" for label in labels)
    paths = "".join(f"<Path>{label}: ab</Path>\n" for label in labels)
    block = f"<Parallel><Goal>{outlines}</Goal>{paths}<Conclusion>c</Conclusion></Parallel>"
    topology = toy("multiverse").parse(f"{block}d{block}")
    assert topology.n_segments == 143 and topology.bitmaps().shape == (143, 3)
    assert np.array_equal(topology.dense_mask().numpy(), by_hand(topology))
    assert np.array_equal(topology.position_ids, positions_by_hand(topology))


@pytest.mark.parametrize("grammar", GRAMMARS)
def test_a_text_may_be_read_in_parts(grammar: str, toy: Callable, random_text: Callable) -> None:
    """A text fed in parts gives the same as in one call, if no part ends within a header."""
    vocabulary = toy(grammar)
    for seed in range(60):
        ids = vocabulary.encode(random_text(grammar, seed, True))
        whole = TopologyBuilder(grammar, vocabulary.token_ids, decode=vocabulary.decode)
        expected = whole.feed_many(ids)
        parts = TopologyBuilder(grammar, vocabulary.token_ids, decode=vocabulary.decode)
        found, steps = [], iter(whole.plan)
        for token in ids:
            step = next(steps) if token == vocabulary.token_ids.get("<Step>") else None
            found.append(parts.feed(token, step))
        assert [place.segment for place in found] == expected.segment_ids.tolist()
        assert [place.position for place in found] == expected.position_ids.tolist()
        assert parts.graph.parents == whole.graph.parents and parts.num_tokens == whole.num_tokens == len(ids)


def test_labels_tell_branches_apart(toy: Callable, plan_text: Callable) -> None:
    block = (
        "<Parallel><Goal><Outline>{0}1: x</Outline><Outline>{0}2: y</Outline></Goal>"
        "<Path>{0}1: a</Path><Path>{0}2: {1}</Path><Conclusion>c</Conclusion></Parallel>"
    )
    text = "a" + block.format("", block.format("2.", "b"))
    assert toy("multiverse").parse(text).labels == ["root", "1", "2", "2.1", "2.2", "2.join", "join"]
    vocabulary = toy("multiverse")
    unread = Topology.from_token_ids(vocabulary.encode(text), "multiverse", vocabulary.token_ids)
    assert unread.labels == ["root", "1", "2", "2.1", "2.2", "2.join", "join"]
    assert toy("medverse").parse(plan_text({1: [], 2: [1]})).labels == ["root", "1", "2", "join"]


def test_what_generation_forces_is_marked(toy: Callable, plan_text: Callable) -> None:
    """And nothing that the model chooses: closing tags, bodies, conclusions."""
    text = (
        "<Parallel>\n<Goal>\n<Outline>1: x</Outline>\n<Outline>2: y</Outline>\n</Goal>\n"
        "<Path>\n1: ab</Path>\n<Path>\n2: c</Path>\n<Conclusion>\nd</Conclusion>\n</Parallel>\n"
    )
    vocabulary = toy("multiverse")
    ids, forced = vocabulary.encode(text), vocabulary.parse(text).forced
    spans = "".join(vocabulary.decode([i]) if mark else "|" for i, mark in zip(ids, forced, strict=True))
    assert [part for part in spans.split("|") if part] == ["\n<Path>\n1:", "\n<Path>\n2:", "\n<Conclusion>\n"]
    vocabulary, text = toy("medverse"), plan_text({1: [], 2: [1]})
    ids, forced = vocabulary.encode(text), vocabulary.parse(text).forced
    spans = "".join(vocabulary.decode([i]) if mark else "|" for i, mark in zip(ids, forced, strict=True))
    assert [part for part in spans.split("|") if part] == [
        "\n<Execution>\n<Step> Transient Step 1: A -> 1\n",
        "\n<Step> Transient Step 2: A -> 2\n",
        "\n</Execution>\n<Conclusion>\n",
    ]


def test_plan_titles_and_dependencies_are_read(toy: Callable) -> None:
    vocabulary = toy("medverse")
    builder = TopologyBuilder("medverse", vocabulary.token_ids, decode=vocabulary.decode)
    outlines = ("transient step 1: Fever -> A; dependency: []", "Transient Step  2 : B, A -> C ;Dependency : [ 1 ]")
    builder.feed_many(vocabulary.encode("<Plan>" + "".join(f"<Outline>{o}</Outline>\n" for o in outlines) + "</Plan>"))
    assert builder.plan == {1: [], 2: [1]} and builder.titles == {1: "Fever -> A", 2: "B, A -> C"}


def test_sixteen_thousand_tokens_are_read_quickly(toy: Callable) -> None:
    """The bound is generous; the time does not grow with the square of the length."""
    vocabulary = toy("multiverse")
    labels = [str(i + 1) for i in range(8)]
    outlines = "".join(f"<Outline>{label}: x</Outline>\n" for label in labels)
    paths = "".join(f"<Path>\n{label}: {'a' * 1500}</Path>\n" for label in labels)
    conclusion = f"<Conclusion>\n{'c' * 2000}</Conclusion>\n"
    text = f"{'b' * 2000}<Parallel>\n<Goal>\n{outlines}</Goal>\n{paths}{conclusion}</Parallel>"
    ids = np.array(vocabulary.encode(text))
    assert len(ids) > 16000
    took = []
    for _ in range(5):
        begin = time.perf_counter()
        vocabulary.parse_ids(ids)
        took.append(time.perf_counter() - begin)
    assert min(took) < 0.05


# Whatever comes


@pytest.mark.parametrize("grammar", GRAMMARS)
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_lenient_reading_takes_any_sequence(grammar: str, data: st.DataObject) -> None:
    """No order of tags is an error, and segments, positions and visibility obey their definitions for all of them."""
    tags = {tag: i for i, tag in enumerate(CONTROL_TOKENS[grammar])}
    headers = [
        " Transient Step 1: a\n",
        " Transient Step 2: b\n",
        "Transient Step 2: b; Dependency: [1, 7]",
        "\n",
        "1: x",
    ]
    names = {i: tag for tag, i in tags.items()} | {50 + i: header for i, header in enumerate(headers)}
    ids = data.draw(st.lists(st.sampled_from(sorted(names)), max_size=60))
    mode = data.draw(st.sampled_from(MODES))

    def decode(given_ids: Any) -> str:
        return "".join(names[i] for i in given_ids)

    topology = Topology.from_token_ids(ids, grammar, tags, mode=mode, strict=False, decode=decode, allow_truncated=True)
    assert len(topology) == len(ids)
    assert all(parent < segment for segment, parents in enumerate(topology.parents) for parent in parents)
    starts: list[int] = []
    ends: list[int] = []
    for segment, parents in enumerate(topology.parents):
        mine = np.flatnonzero(topology.segment_ids == segment)
        starts.append(max((ends[parent] + 1 for parent in parents), default=0))
        ends.append(starts[-1] + len(mine) - 1)
        assert topology.position_ids[mine].tolist() == list(range(starts[-1], ends[-1] + 1))
        for ancestor in range(segment):
            if len(mine) and topology.reachable(segment, ancestor):
                assert (np.flatnonzero(topology.segment_ids == ancestor) < mine[0]).all()
    builder = TopologyBuilder(grammar, tags, mode=mode, strict=False, decode=decode)
    if "<Step>" not in tags or tags["<Step>"] not in ids:
        assert [builder.feed(i).position for i in ids] == topology.position_ids.tolist()


# Bad calls


class OneTokenATag:
    """A tokenizer that knows some tags, and cuts the others up."""

    unk_token_id = 1

    def __init__(self, known: dict[str, list[int]]) -> None:
        self.known = known

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return self.known[text]

    def decode(self, ids: list[int], skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str:
        assert not skip_special_tokens and not clean_up_tokenization_spaces
        return f"{ids}"


def test_a_tokenizer_without_the_tags_is_named() -> None:
    known = {tag: [10 + i] for i, tag in enumerate(CONTROL_TOKENS["multiverse"])}
    assert control_token_ids(OneTokenATag(known), "multiverse") == {tag: ids[0] for tag, ids in known.items()}
    with pytest.raises(TopologyError, match=r"lacks topology tokens: <Goal> </Path>; .*--patch multiverse"):
        control_token_ids(OneTokenATag({**known, "<Goal>": [5, 6], "</Path>": [1]}), "multiverse")
    assert decode_function(OneTokenATag(known))(np.array([3, 4]).tolist()) == "[3, 4]"


def test_bad_arguments_are_named(toy: Callable) -> None:
    tags = toy("medverse").token_ids
    with pytest.raises(UsageError, match="grammar='tree'.*multiverse, medverse"):
        TopologyBuilder("tree", tags)
    with pytest.raises(UsageError, match="mode='all'.*dag, layers, flat"):
        TopologyBuilder("medverse", tags, mode="all")
    with pytest.raises(TopologyError, match="no token id is known for <Parallel>.*--patch multiverse"):
        TopologyBuilder("multiverse", tags)
    with pytest.raises(TopologyError, match="pass decode="):
        TopologyBuilder("medverse", tags)
    with pytest.raises(TopologyError, match="no open block to fork"):
        TopologyBuilder("multiverse", toy("multiverse").token_ids).fork(2)
