"""No message that the edge sends has a field for text, tokens, labels or M: each has to say what it is for.

The test walks the compiled descriptors of everything reachable from a request. A field that is added
to any of those messages fails it until someone writes down, here, why it can carry none of the three.
"""

from google.protobuf.descriptor import Descriptor, FieldDescriptor

from shared.pb.privatelora.v1 import private_lora_pb2 as pb

SERVICE = pb.DESCRIPTOR.services_by_name["PrivateLoraService"]

# Field -> why it carries neither text, nor token ids, nor labels, nor M or its gradient. Scalars are listed
# too: one integer a step would be enough to send a token id.
ALLOWED = {
    "DescribeRequest.protocol_version": "a constant of the program",
    "FetchEdgePartsRequest.part_index": "place of a public file in the cloud's own list",
    "FetchEdgePartsRequest.offset_bytes": "how much of that file the edge already has",
    "DecodeRequest.open": "message",
    "DecodeRequest.step": "message",
    "DecodeRequest.residual_codes": "message",
    "Open.protocol_version": "a constant of the program",
    "Open.fingerprint": "message",
    "Open.wire_dtype": "enum",
    "Open.session_id": "the cloud's own random bytes, given back",
    "Open.hidden_dtype": "enum",
    "Open.codes_dtype": "enum",
    "Open.residual_codes_dtype": "enum",
    "Fingerprint.root": "SHA-256 over public parts, 32 bytes",
    "Fingerprint.plan": "SHA-256 of the plan, 32 bytes",
    "Fingerprint.lowrank": "SHA-256 of A and B, 32 bytes",
    "Fingerprint.layers": "SHA-256 of the decoder layers, 32 bytes",
    "Fingerprint.edge": "SHA-256 of the public edge parts, 32 bytes",
    "Step.step": "a counter that has to increase",
    "Step.parents": "row indices below max_rows, for beams",
    "Step.spans": "message",
    "Step.hidden": "message: h0, an activation",
    "Step.residual_codes": "message: xAM, an activation",
    "Span.row": "row index below max_rows",
    "Span.start": "position below max_context_tokens, checked against the row's length",
    "Span.count": "number of positions, checked against the tensor's rows",
    "Span.keep": "number of positions to return, at most count",
    "LayerCodes.layer": "layer index that the plan adapts",
    "LayerCodes.codes": "message: xAM, an activation",
    "ResidualCodes.step": "the counter of the step that it belongs to",
    "ResidualCodes.residual_codes": "message: xAM, an activation",
    "TuneRequest.open": "message",
    "TuneRequest.batch": "message",
    "TuneRequest.hidden": "message: h0, an activation",
    "TuneRequest.residual_codes": "message: xAM, an activation",
    "TuneRequest.hidden_gradient": "message: dL/dhL, the gradient of an activation",
    "TuneRequest.codes_gradient": "message: dL/dc, the gradient of an activation",
    "TuneOpen.protocol_version": "a constant of the program",
    "TuneOpen.fingerprint": "message",
    "TuneOpen.wire_dtype": "enum",
    "Batch.batch": "a counter that has to increase",
    "Batch.lengths": "tokens of each sequence, whose sum is that of the tensors' rows",
    "Batch.forward_only": "whether gradients follow",
    "Rows.batch": "the counter of the batch that they belong to",
    "Rows.layer": "layer index that the plan adapts or exchanges at",
    "Rows.first": "index of a row, checked to continue the rows before",
    "Rows.rows": "message: an activation or its gradient, as the field of TuneRequest says",
    "Open.claim": "message: how much room a session may come to need",
    "Step.claim": "message: the same, when it changes",
    "KvClaim.rows": "a count of rows, at most what the cloud allows",
    "KvClaim.row_tokens": "a count of positions, at most the context",
    "Tensor.dtype": "enum",
    "Tensor.shape": "sizes, refused unless they are (positions, width fixed by the plan)",
    "Tensor.data": "activations of the length that the shape says; only in the fields named above",
    "Tensor.scales": "the largest numbers of the activations in data, as many as these have rows and groups",
}
TENSOR_FIELDS = {"Step.hidden", "LayerCodes.codes", "Rows.rows"}
FORBIDDEN_TYPES = {FieldDescriptor.TYPE_STRING: "a string", FieldDescriptor.TYPE_GROUP: "a group"}


def _name(field: FieldDescriptor) -> str:
    return f"{field.containing_type.name}.{field.name}"


def _reachable_fields() -> dict[str, FieldDescriptor]:
    """Return every field of every message that a request can contain, by its short name."""
    fields: dict[str, FieldDescriptor] = {}
    seen: set[str] = set()
    waiting: list[Descriptor] = [method.input_type for method in SERVICE.methods]
    while waiting:
        message = waiting.pop()
        if message.full_name in seen:
            continue
        seen.add(message.full_name)
        for field in message.fields:
            fields[_name(field)] = field
            if field.message_type is not None:
                waiting.append(field.message_type)
    return fields


def test_requests_have_no_text_field() -> None:
    for name, field in _reachable_fields().items():
        assert field.type not in FORBIDDEN_TYPES, (
            f"{name} is {FORBIDDEN_TYPES[field.type]}: it could carry text"
        )


def test_every_request_field_is_accounted_for() -> None:
    fields = _reachable_fields()
    new = sorted(fields.keys() - ALLOWED.keys())
    assert not new, f"the edge could send data in {new}: say in ALLOWED why they carry no text, token id or M"
    gone = sorted(ALLOWED.keys() - fields.keys())
    assert not gone, f"{gone} no longer exist: take them off ALLOWED"


def test_requests_hold_only_our_own_messages() -> None:
    for name, field in _reachable_fields().items():
        if field.message_type is not None:
            # Any, Struct or a map would be a door for anything
            assert field.message_type.full_name.startswith("privatelora.v1."), name
            assert not field.message_type.GetOptions().map_entry, name


def test_tensors_are_sent_only_as_activations() -> None:
    tensors = {
        name
        for name, field in _reachable_fields().items()
        if field.message_type is not None and field.message_type.name == "Tensor"
    }
    assert tensors == TENSOR_FIELDS


def test_tuning_rows_are_activations_and_their_gradients() -> None:
    rows = {
        field.name
        for field in pb.TuneRequest.DESCRIPTOR.fields
        if field.message_type is pb.Rows.DESCRIPTOR  # one message each, so that none can pass for another
    }
    assert rows == {"hidden", "residual_codes", "hidden_gradient", "codes_gradient"}


def test_no_field_number_is_open_to_extension() -> None:
    for field in _reachable_fields().values():
        assert not field.containing_type.is_extendable
