"""What overwriting, dropping, rearranging and a full cache do to a session's rows and steps."""

import grpc
import pytest

from cloud_server.kv_cache import Row
from cloud_server.outbox import OUTBOX_MESSAGES, Outbox
from cloud_server.refusal import Refusal
from shared.pb.privatelora.v1 import private_lora_pb2 as pb
from tests.unit.session_talk import BLOCK_BYTES, Talk, two_rows

Code = grpc.StatusCode


@pytest.fixture
def talk() -> Talk:
    return two_rows()


# --- overwriting --------------------------------------------------------------------------------------------


def test_a_step_cancels_those_that_it_overwrites_and_later_ones(talk: Talk) -> None:
    for start in (5, 7, 9):
        talk.step((0, start, 2, 1))
    talk.step((0, 7, 1, 1))
    assert list(talk.session.steps) == [2, 5] and talk.lengths == [8, 3]
    assert talk.session.steps[5].before is talk.session.steps[2]


def test_nothing_is_built_on_positions_that_were_cancelled(talk: Talk) -> None:
    """Positions 5 and 6 would go with the step that starts at 5: a start at 7 leaves a gap."""
    talk.step((0, 5, 10, 1))
    talk.refuses(Code.FAILED_PRECONDITION, "row 0 holds 5 positions, the step starts at 7", (0, 7, 1, 1))
    talk.step((0, 4, 1, 1))
    assert talk.lengths == [5, 3] and list(talk.session.steps) == [3]


def test_other_rows_of_a_cancelled_step_lose_its_positions_too(talk: Talk) -> None:
    talk.step((0, 5, 1, 1), (1, 3, 1, 1))
    talk.step((0, 5, 1, 1))
    assert talk.lengths == [6, 3]
    talk.refuses(Code.FAILED_PRECONDITION, "row 1 holds 3 positions, the step starts at 4", (1, 4, 1, 1))


def test_parents_are_followed_to_find_what_is_overwritten(talk: Talk) -> None:
    """New row 0 is old row 1, whose third position a step in flight is writing."""
    talk.step((1, 2, 2, 1))
    talk.step((0, 2, 1, 1), parents=[1, 0])
    assert list(talk.session.steps) == [3] and talk.lengths == [3, 5]


def test_untouched_rows_keep_their_steps(talk: Talk) -> None:
    talk.step((0, 5, 1, 1))
    talk.step((1, 1, 1, 1))
    assert list(talk.session.steps) == [2, 3] and talk.lengths == [6, 2]


# --- rows ---------------------------------------------------------------------------------------------------


def test_parents_reorder_fork_and_free(talk: Talk) -> None:
    first, second = talk.session.rows
    talk.step((0, 3, 1, 1), (1, 3, 1, 1), parents=[1, 1], finish=True)
    assert talk.session.rows[0] is second and first.blocks == []
    assert talk.lengths == [4, 4]
    talk.step((0, 4, 1, 1), parents=[1], finish=True)
    assert talk.lengths == [5] and talk.engine.cache.bytes_used == BLOCK_BYTES


def test_closing_gives_everything_back(talk: Talk) -> None:
    talk.step((0, 5, 40, 1), (1, 3, 1, 1), (2, 0, 1, 1))
    talk.session.close()
    assert talk.engine.cache.bytes_used == 0 and talk.engine.steps == [] and talk.session.rows == []
    assert talk.engine.left == [talk.session], "nobody should wait for its next token"
    talk.session.close()  # twice is no harm


def test_a_dropped_session_holds_what_is_written(talk: Talk) -> None:
    talk.step((0, 5, 40, 1), (1, 3, 10, 1))
    talk.step((0, 45, 5, 1))
    assert talk.session.row_lengths() == [5, 3]
    talk.session.drop()
    assert talk.lengths == talk.session.row_lengths() == [5, 3]
    assert talk.engine.steps == [] and talk.engine.cache.bytes_used == 2 * BLOCK_BYTES
    assert talk.engine.left == [talk.session], "nobody should wait for its next token"
    talk.step((0, 5, 1, 1), finish=True)
    assert talk.session.row_lengths() == [6, 3]


def test_who_writes_its_blocks_again_has_them_though_a_slice_still_runs_on_them() -> None:
    talk = Talk(blocks=2)
    old = talk.step((0, 0, 40, 1))
    with talk.engine.cache.in_use([old.spans[0].row.table]):
        new = talk.step((0, 0, 50, 1))
        assert list(talk.session.steps) == [new.number] and talk.engine.cache.free_blocks == 0
        talk.step((0, 0, 10, 1))  # of the two, the second is not written again
        assert len(talk.session.rows[0].blocks) == 1 and talk.engine.cache.free_blocks == 0
    assert talk.engine.cache.free_blocks == 1
    talk.session.close()
    assert talk.engine.cache.bytes_used == 0


def test_a_crop_takes_what_was_written(talk: Talk) -> None:
    talk.step((0, 2, 1, 1))
    talk.session.drop()
    assert talk.session.row_lengths() == [2, 3]


# --- a full cache -------------------------------------------------------------------------------------------


def test_a_full_cache_is_refused_with_a_hint() -> None:
    talk = Talk(blocks=2)
    talk.step((0, 0, 40, 1), finish=True)
    with pytest.raises(
        Refusal, match=r"the KV cache is full \(1 blocks needed, 0 of 2 free\); try again later"
    ) as e:
        talk.step((0, 40, 1, 1), (1, 0, 1, 1))
    assert e.value.code is Code.RESOURCE_EXHAUSTED and e.value.retry_after_s
    talk.session.drop()
    assert talk.session.row_lengths() == [40, 0]
    assert talk.engine.cache.bytes_used == 2 * BLOCK_BYTES


def test_room_is_made_once_a_step_not_once_a_try() -> None:
    """Rows are rearranged before room is asked for; a second try must not rearrange them again."""
    hoard: list[Row] = []
    talk = Talk(blocks=4, make_room=lambda: bool(hoard) and (talk.engine.cache.free(hoard.pop()) or True))
    talk.step((0, 0, 5, 1), (1, 0, 3, 1), finish=True)
    first, second = talk.session.rows
    for _ in range(2):
        hoard.append(Row())
        talk.engine.cache.reserve(hoard[-1], 0, 1)
    talk.step((0, 3, 1, 1), (1, 5, 1, 1), (2, 5, 1, 1), parents=[1, 0, 0], finish=True)
    assert talk.session.rows[0] is second and talk.session.rows[1] is first
    assert talk.lengths == [4, 6, 6] and len(hoard) == 1


# --- the outbox ---------------------------------------------------------------------------------------------


async def test_the_outbox_keeps_order_and_says_when_it_is_full() -> None:
    outbox = Outbox()
    messages = [pb.DecodeResponse(codes=pb.Codes(step=number)) for number in range(OUTBOX_MESSAGES)]
    for message in messages:
        assert not outbox.is_full
        outbox.put(message)
    assert outbox.is_full
    assert await outbox.get() is messages[0]
    await outbox.has_room()
    assert [await outbox.get() for _ in messages[1:]] == messages[1:]
    outbox.put(messages[0])
    outbox.clear()
    outbox.put(messages[1])
    assert await outbox.get() is messages[1]
