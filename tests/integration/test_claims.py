"""An edge says what an answer may come to need, so that the cloud keeps so much for it and no more."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from transformers import StoppingCriteria

from edge_client.model import PrivateLoraForCausalLM
from tests.integration.served import Served

BLOCK_BYTES = 2 * 4 * 16 * 4 * 32  # k and v, four layers, two heads of 8, float32, 32 positions


class Soon(StoppingCriteria):
    """Ends an answer long before it has to: what it may need is another matter than what it does."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= 6)


def test_an_answer_claims_its_longest_row_and_rows(tiny_cloud: Served, tmp_path: Path) -> None:
    folders = {"cache_dir": tmp_path / "cache", "config_dir": tmp_path / "config"}
    ids = torch.tensor([[5, 6, 7]])
    with tiny_cloud.raw() as raw:
        assert raw.settled()

        def claimed() -> int:
            return raw.describe().load.kv_bytes_claimed // BLOCK_BYTES

        with PrivateLoraForCausalLM.from_cloud(tiny_cloud.address, plan="r8", **folders) as edge:
            for options, blocks in (
                ({"max_new_tokens": 30}, 2),  # 33 positions of a row
                ({"max_new_tokens": 200}, 7),  # the session is the same one, and claims more
                ({"max_new_tokens": 61}, 2),
                ({"max_new_tokens": 4, "num_beams": 3}, 3),
                ({"max_new_tokens": 10_000}, 16),  # no more than a row may hold
            ):
                edge.generate(ids, do_sample=False, stopping_criteria=[Soon()], **options)
                assert claimed() == blocks, options
                assert raw.describe().load.sessions == 1
            assert edge(torch.tensor([[5, 6, 7, 8]])).logits.shape[1] == 4  # no answer, so nothing is said
        assert raw.settled() and claimed() == 0


def test_edges_that_do_not_fit_wait_for_their_turn(cramped_cloud: Served, tmp_path: Path) -> None:
    """Ten answers that may fill the cache eightfold: all are given, and none is ended for another."""
    folders = {"cache_dir": tmp_path / "cache", "config_dir": tmp_path / "config"}
    ids = torch.tensor([[5, 6, 7]])
    longest = {"max_new_tokens": 500, "do_sample": False, "stopping_criteria": [Soon()]}
    with PrivateLoraForCausalLM.from_cloud(cramped_cloud.address, plan="r8", **folders) as edge:
        expected = edge.generate(ids, **longest).tolist()
        with ThreadPoolExecutor(10) as threads:
            found = list(threads.map(lambda _: edge.generate(ids, **longest).tolist(), range(10)))
    assert found == [expected] * 10
