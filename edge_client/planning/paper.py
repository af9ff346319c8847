"""The paper's own estimate of its speed (arXiv 2311.14030 and its authors' page), with any link.

    TPS = 1 / (1 / TPS_cloud + 1 / TPS_PL + 1 / TPS_head + t_comm)

with the decoder of an A100 80G, the head on a phone, both bound by memory, and codes over 5G without latency.
Its inputs are below. ``TPS_cloud`` is the measured speed of the whole model in the cloud; whether h0 and hL
are part of ``t_comm`` is not said: ``with_hidden`` adds them, and is further from the published figures.
"""

from pydantic import BaseModel, Field

from edge_client.planning.network import LinkFacts
from edge_client.planning.speeds import FROZEN

ELEMENT_BYTES = 2  # fp16, on the wire and in memory
A100_BYTES_S = 1935e9  # memory of the cloud
PHONE_BYTES_S = 42.7e9  # memory of an iPhone 13 Pro Max
PAPER_LINK = LinkFacts(name="paper", rtt_s=0.0, up_bit_s=60e6, down_bit_s=100e6)
VOCAB_SIZE = 32_000
PROJECTIONS = 3  # q, k and v, an A-M-B each


class PaperModel(BaseModel):
    """A model of the paper, with its published figures."""

    model_config = FROZEN

    name: str
    num_layers: int = Field(description="Decoder layers (count)")
    hidden_size: int = Field(description="Width of hidden states (elements)")
    cloud_tok_s: float = Field(description="The whole model on the A100 (tokens/s); an input")
    published_tok_s: float = Field(description="The paper's estimate of PrivateLoRA at r = 64 (tokens/s)")


PAPER_MODELS = (
    PaperModel(name="7B", num_layers=32, hidden_size=4096, cloud_tok_s=37.1, published_tok_s=27.8),
    PaperModel(name="13B", num_layers=40, hidden_size=5120, cloud_tok_s=27.8, published_tok_s=21.1),
    PaperModel(name="33B", num_layers=60, hidden_size=6656, cloud_tok_s=16.7, published_tok_s=13.2),
)


class PaperEstimate(BaseModel):
    """The estimate for one model over one link."""

    model_config = FROZEN

    model: str
    link: str
    round_trips: int = Field(description="Of one token: an exchange a layer, and hL (count)")
    cloud_s: float = Field(description="The backbone in the cloud (seconds)")
    low_rank_s: float = Field(description="A and B in the cloud, M on the phone (seconds)")
    head_s: float = Field(description="The head on the phone (seconds)")
    transfer_s: float = Field(description="Bits over rates (seconds)")
    latency_s: float = Field(description="Round trips, which the paper leaves out (seconds)")
    tok_s: float = Field(description="What comes out (tokens/s)")


def estimate(
    model: PaperModel, link: LinkFacts = PAPER_LINK, rank: int = 64, *, with_hidden: bool = False
) -> PaperEstimate:
    """Return the paper's estimate, with the latency of ``link`` added.

    Parameters
    ----------
    model
        One of `PAPER_MODELS`.
    link
        The paper's own has no latency.
    rank
        Of codes and residual codes alike (elements).
    with_hidden
        Count h0 and hL too.
    """
    d, layers = model.hidden_size, model.num_layers
    cloud = 1 / model.cloud_tok_s
    a_and_b = layers * PROJECTIONS * 2 * d * rank * ELEMENT_BYTES
    m = layers * PROJECTIONS * rank * rank * ELEMENT_BYTES
    low_rank = a_and_b / A100_BYTES_S + m / PHONE_BYTES_S
    head = VOCAB_SIZE * d * ELEMENT_BYTES / PHONE_BYTES_S
    each_way = (layers * PROJECTIONS * rank + (d if with_hidden else 0)) * ELEMENT_BYTES
    transfer, trips = link.transfer_s(each_way, each_way), layers + 1
    latency = trips * link.rtt_s
    return PaperEstimate(
        model=model.name,
        link=link.name,
        round_trips=trips,
        cloud_s=cloud,
        low_rank_s=low_rank,
        head_s=head,
        transfer_s=transfer,
        latency_s=latency,
        tok_s=1 / (cloud + low_rank + head + transfer + latency),
    )


def footprint_bytes(model: PaperModel, rank: int = 128) -> int:
    """Return what the paper says the phone holds: head and M, without the embedding (bytes)."""
    m = model.num_layers * PROJECTIONS * rank * rank
    return (VOCAB_SIZE * model.hidden_size + m) * ELEMENT_BYTES
