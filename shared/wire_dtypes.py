"""Which dtype each kind of tensor of a session travels in: agreed when it is opened, then fixed."""

from dataclasses import dataclass

from shared.pb.privatelora.v1 import private_lora_pb2 as pb
from shared.plan import Plan
from shared.wire import DTYPE_NAMES, INT4, dtype_name, row_bytes


@dataclass(frozen=True)
class WireDtypes:
    """The dtypes of one session, both ways.

    Parameters
    ----------
    hidden
        Of h0 and hL: one scale a row where it is int8. Not int4, which is too coarse for them.
    codes, residual_codes
        Of xA and xAM: one scale for each group of a row where it is int8 or int4.
    """

    hidden: "pb.Dtype.ValueType"
    codes: "pb.Dtype.ValueType"
    residual_codes: "pb.Dtype.ValueType"

    def __post_init__(self) -> None:
        """Refuse what no session may agree on.

        Raises
        ------
        ValueError
            If hidden states would travel as int4.
        """
        if self.hidden == INT4:
            raise ValueError("hidden states do not travel as int4; it is for codes and residual codes")

    @classmethod
    def all(cls, dtype: "pb.Dtype.ValueType") -> "WireDtypes":
        """Return the same dtype for every kind."""
        return cls(dtype, dtype, dtype)

    @classmethod
    def named(
        cls,
        default: "str | pb.Dtype.ValueType",
        hidden: str | None = None,
        codes: str | None = None,
        residual_codes: str | None = None,
    ) -> "WireDtypes":
        """Return dtypes by their names, ``default`` where a name is None.

        Raises
        ------
        ValueError
            If there is no dtype of a name, or hidden states would travel as int4.
        """
        return cls(*(_number(default if name is None else name) for name in (hidden, codes, residual_codes)))

    @classmethod
    def asked(cls, request: pb.Open) -> "WireDtypes":
        """Return what an edge asks for.

        Raises
        ------
        ValueError
            If that is no dtype of ours; the message names the field.
        """
        _check(request.wire_dtype, "wire dtype")
        found = cls(
            request.hidden_dtype or request.wire_dtype,
            request.codes_dtype or request.wire_dtype,
            request.residual_codes_dtype or request.wire_dtype,
        )
        _check(found.hidden, "hidden dtype")
        _check(found.codes, "codes dtype")
        _check(found.residual_codes, "residual codes dtype")
        return found

    def ask(self, request: pb.Open) -> None:
        """Write these into an edge's first message."""
        request.wire_dtype = request.hidden_dtype = self.hidden
        request.codes_dtype, request.residual_codes_dtype = self.codes, self.residual_codes

    def hidden_bytes(self, plan: Plan) -> int:
        """Return the bytes of one position's hidden state."""
        return row_bytes(self.hidden, plan.hidden_size)

    def codes_bytes(self, plan: Plan) -> int:
        """Return the bytes of one position's codes at one exchange."""
        return row_bytes(self.codes, plan.codes_width, plan.groups)

    def residual_bytes(self, plan: Plan) -> int:
        """Return the bytes of one position's residual codes for one layer."""
        return row_bytes(self.residual_codes, plan.residual_width, plan.groups)


def _number(name: "str | pb.Dtype.ValueType") -> "pb.Dtype.ValueType":
    if isinstance(name, str):
        if name not in DTYPE_NAMES:
            raise ValueError(f"wire dtype {name!r} is not one of {', '.join(DTYPE_NAMES)}")
        return DTYPE_NAMES[name]
    return name


def _check(dtype: int, what: str) -> None:
    if dtype not in DTYPE_NAMES.values():
        raise ValueError(f"{what} must be one of {', '.join(DTYPE_NAMES)}, got {dtype_name(dtype)}")
