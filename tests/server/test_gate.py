"""The gate: what may enter, and for all else the reason."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch

from fedtune.adapter import Adapter, Factors
from fedtune.envelope import Envelope
from fedtune.errors import ClientFailed, Refused
from fedtune.payload import Payload, Role, payload_of, vectors
from fedtune.strategy import ADAPTER, Answer, Ask, ClientInfo, Fold, Limits
from fedtune.wire import pack_answer, pack_failure
from server.gate import admit, misfits, schema_of

PAIR = Factors(torch.ones(2, 3), torch.ones(5, 2), 1.5)  # rank 2 on a weight of (5, 3)
LIKE = Adapter({"q": PAIR}, {"head": torch.zeros(4, 3)}, base="b" * 32)
CLIENT = ClientInfo("ann", examples=7, rank=2)
GOOD = Answer(payload_of(LIKE), weight=7.0, metrics={"loss": 1.0})
HEADER = {"ask": "3.0", "base": LIKE.base, "client": "ann"}


def let_in(answer: Answer = GOOD, header: Mapping[str, Any] = HEADER, client: ClientInfo = CLIENT) -> Answer:
    return admit(pack_answer(answer, header), "3.0", client, LIKE, max_weight=100.0)


def changed(name: str, tensor: torch.Tensor, role: Role = Role.A) -> Answer:
    """The good answer with one tensor put in or replaced."""
    payload = GOOD.payload
    return replace(
        GOOD, payload=replace(payload, tensors={**payload.tensors, name: tensor}, roles={**payload.roles, name: role})
    )


def with_scalar(name: str, value: float) -> Answer:
    return replace(GOOD, payload=replace(GOOD.payload, scalars={**GOOD.payload.scalars, name: value}))


def spoilt(tensor: torch.Tensor, value: float) -> torch.Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[-1] = value
    return tensor


def test_a_good_answer_comes_in_as_it_was_sent() -> None:
    answer = let_in()
    assert (answer.weight, answer.metrics, answer.payload.scalars) == (7.0, {"loss": 1.0}, {"q.scale": 1.5})
    assert all(torch.equal(answer.payload.tensors[name], tensor) for name, tensor in GOOD.payload.tensors.items())


def test_a_part_of_the_adapter_is_enough() -> None:
    assert list(let_in(replace(GOOD, payload=payload_of(LIKE, [Role.B]))).payload.tensors) == ["q.lora_B"]


def test_vectors_have_any_name_and_shape() -> None:
    assert "norms" in let_in(changed("norms", torch.ones(17), Role.VECTOR)).payload.tensors


def test_the_rank_is_the_one_that_the_client_declared() -> None:
    pair = Factors(torch.ones(1, 3), torch.ones(5, 1), 1.5)
    answer = replace(GOOD, payload=payload_of(Adapter({"q": pair})))
    assert let_in(answer, client=replace(CLIENT, rank=1)).payload.tensors["q.lora_A"].shape == (1, 3)
    with pytest.raises(Refused, match=r"of shape \(1, 3\), wanted \(2, 3\)"):
        let_in(answer)
    assert admit(pack_answer(answer, HEADER), "3.0", CLIENT, LIKE, 100.0, lower_rank=True).payload.scalars == {"q.scale": 1.5}


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (
            replace(GOOD, weight=0.0),
            r"its weight is 0, wanted more than 0 and at most 7 \(the examples that it registered with\)$",
        ),
        (replace(GOOD, weight=-1.0), "its weight is -1,"),
        (replace(GOOD, weight=math.nan), "its weight is nan,"),
        (replace(GOOD, weight=math.inf), "its weight is inf,"),
        (replace(GOOD, weight=1e308), r"its weight is 1e\+308,"),
        (replace(GOOD, weight=7.001), r"its weight is 7.001, wanted more than 0 and at most 7 "),
        (changed("q.lora_A", spoilt(PAIR.A, math.nan)), "'q.lora_A' is not finite"),
        (changed("q.lora_B", spoilt(PAIR.B, math.inf), Role.B), "'q.lora_B' is not finite"),
        (changed("head", spoilt(torch.zeros(4, 3), -math.inf), Role.DENSE), "'head' is not finite"),
        (changed("norms", torch.tensor([math.nan]), Role.VECTOR), "'norms' is not finite"),
        (with_scalar("q.scale", math.nan), "'q.scale' is nan, wanted a finite number"),
        (with_scalar("shift", math.inf), "'shift' is inf, wanted a finite number"),
        (replace(GOOD, metrics={"loss": math.nan}), "'loss' is nan, wanted a finite number"),
        (changed("q.lora_A", torch.ones(2, 4)), r"'q.lora_A' is of shape \(2, 4\), wanted \(2, 3\)"),
        (changed("q.lora_B", torch.ones(10), Role.B), r"'q.lora_B' is of shape \(10,\), wanted \(5, 2\)"),
        (changed("q.lora_A", torch.ones(3, 3)), r"'q.lora_A' is of shape \(3, 3\), wanted \(2, 3\)"),  # rank 3
        (changed("head", torch.ones(3, 4), Role.DENSE), r"'head' is of shape \(3, 4\), wanted \(4, 3\)"),
        (changed("k.lora_A", torch.ones(2, 3)), "'k.lora_A' is no part of the adapter that the job describes"),
        (changed("embed", torch.ones(2, 3), Role.DENSE), "'embed' is no part of the adapter"),
        (changed("q.lora_A", PAIR.A, Role.DENSE), "'q.lora_A' came as dense, wanted lora_A"),
        (changed("head", torch.zeros(4, 3), Role.VECTOR), "'head' came as vector, wanted dense"),
        (changed("q.lora_A", PAIR.A.int()), "'q.lora_A' came as int32, wanted float32"),
        (with_scalar("k.scale", 1.0), "'k.scale' is no part of the adapter"),
        (with_scalar("q.scale", 0.0), "'q.scale' is 0, wanted one of 1, 1.5"),
        (with_scalar("q.scale", -1.5), "'q.scale' is -1.5, wanted one of 1, 1.5"),
    ],
)
def test_what_is_refused_and_why(answer: Answer, reason: str) -> None:
    with pytest.raises(Refused, match=reason):
        let_in(answer)


def test_nobody_weighs_more_than_the_job_allows_whatever_it_registered_with() -> None:
    many = replace(CLIENT, examples=1000)
    assert let_in(replace(GOOD, weight=100.0), client=many).weight == 100
    with pytest.raises(Refused, match=r"its weight is 101, wanted more than 0 and at most 100 \(rounds.max_weight\)$"):
        let_in(replace(GOOD, weight=101.0), client=many)


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ({**HEADER, "ask": "2.0"}, "it answers ask 2.0, wanted 3.0"),
        ({**HEADER, "base": "other"}, "it was made on base model other, wanted bbbb"),
        ({"ask": "3.0"}, "it was made on base model None"),
    ],
)
def test_an_answer_to_something_else_is_refused(header: Mapping[str, Any], reason: str) -> None:
    with pytest.raises(Refused, match=reason):
        let_in(header=header)


@pytest.mark.parametrize(
    ("missing", "reason"),
    [
        ("weight", "without weight or metrics"),
        ("metrics", "without weight or metrics"),
        ("roles", "cannot be read"),
        ("scalars", "cannot be read"),
        ("version", "wire version None"),
    ],
)
def test_a_header_with_a_hole_is_refused(missing: str, reason: str) -> None:
    envelope = pack_answer(GOOD, HEADER)
    header = {key: value for key, value in envelope.header.items() if key != missing}
    with pytest.raises(Refused, match=reason):
        admit(Envelope(header, envelope.tensors), "3.0", CLIENT, LIKE, 100.0)


@pytest.mark.parametrize("value", ["many", None, [1]])
def test_a_weight_that_is_no_number_is_refused(value: object) -> None:
    envelope = pack_answer(GOOD, HEADER)
    with pytest.raises(Refused, match="without weight or metrics"):
        admit(Envelope({**envelope.header, "weight": value}, envelope.tensors), "3.0", CLIENT, LIKE, 100.0)


def test_bytes_that_are_too_few_for_the_shape_are_refused() -> None:
    envelope = pack_answer(GOOD, HEADER)
    first, *others = envelope.tensors
    cut = replace(first, data=first.data[:-1])
    with pytest.raises(Refused, match="needs 24 bytes, 23 came"):  # 2 x 3 x 4
        admit(Envelope(envelope.header, (cut, *others)), "3.0", CLIENT, LIKE, 100.0)


def test_a_client_s_own_reason_is_no_refusal() -> None:
    with pytest.raises(ClientFailed, match="out of memory"):
        admit(pack_failure("out of memory", HEADER), "3.0", CLIENT, LIKE, 100.0)


def answer_of(**shapes: tuple[int, ...]) -> Answer:
    return Answer(Payload({name: torch.zeros(shape) for name, shape in shapes.items()}, dict.fromkeys(shapes, Role.VECTOR)))


def test_those_that_differ_from_most_are_misfits_in_whatever_order_they_came() -> None:
    schemas = {
        "ann": schema_of(answer_of(x=(2,), y=(3,))),
        "bob": schema_of(answer_of(x=(2,))),
        "cy": schema_of(answer_of(y=(3,), x=(2,))),
        "dee": schema_of(answer_of(x=(2,), y=(4,))),
    }
    expected = {
        "bob": "its tensors are not those of the other clients: y",
        "dee": "its tensors are not those of the other clients: y",
    }
    for order in itertools.permutations(schemas):
        assert misfits({client: schemas[client] for client in order}) == expected


def test_of_two_that_differ_the_first_by_name_stays() -> None:
    schemas = {"bob": schema_of(answer_of(x=(2,))), "ann": schema_of(answer_of(x=(1,)))}
    assert list(misfits(schemas)) == ["bob"]


def test_for_stacking_names_must_agree_and_ranks_may_differ() -> None:
    four, eight, some = (schema_of(answer_of(**shapes), Fold.EACH) for shapes in ({"x": (4, 2)}, {"x": (8, 2)}, {"y": (4, 2)}))
    assert misfits({"ann": four, "bob": eight}) == {}
    assert list(misfits({"ann": four, "bob": eight, "cy": some})) == ["cy"]


def test_a_scalar_that_the_others_did_not_send_is_a_misfit() -> None:
    """A weighted sum over some would be no mean."""
    plain, more = GOOD, with_scalar("shift", 1.0)
    assert misfits({"ann": schema_of(plain), "bob": schema_of(more), "cy": schema_of(plain)}) == {
        "bob": "its tensors are not those of the other clients: shift"
    }


def test_whoever_names_another_scale_than_the_others_is_a_misfit_of_a_sum() -> None:
    """The factors of a sum are added as they are: the mean of the scales would be everybody's. Where each answer is read by
    itself, clients may differ in alpha."""
    mine, other = GOOD, with_scalar("q.scale", 1e9)
    for fold, odd in ((Fold.SUM, ["ann"]), (Fold.SEEN, ["ann"]), (Fold.EACH, [])):
        schemas = {"ann": schema_of(other, fold), "bob": schema_of(mine, fold), "cy": schema_of(mine, fold)}
        assert list(misfits(schemas)) == odd


def test_nobody_is_a_misfit_among_equals_or_alone() -> None:
    schema = schema_of(GOOD)
    assert misfits({}) == misfits({"ann": schema}) == misfits({"ann": schema, "bob": schema}) == {}


@pytest.mark.parametrize(
    ("scale", "sent", "comes_in"), [(1.0, 1.5, True), (1.5, 1.5, True), (7.0, 7.0, True), (7.0, 1.5, False)]
)
def test_a_scale_is_the_clients_own_the_jobs_or_the_one_that_was_sent(scale: float, sent: float, comes_in: bool) -> None:
    """The client declared 1, the job has 1.5: 7 comes in only if 7 was sent."""
    ask = Ask("train", per_client={CLIENT.id: Payload(scalars={"q.scale": sent})})
    envelope = pack_answer(with_scalar("q.scale", scale), HEADER)
    with nullcontext() if comes_in else pytest.raises(Refused, match=r"'q.scale' is 7, wanted one of 1, 1.5$"):
        admit(envelope, "3.0", CLIENT, LIKE, 100.0, ask=ask)


SLOPES = Ask(
    "train",
    fold=Fold.EACH,
    vectors={"seeds": Limits(3, 0, 4095, integers=True, beside="pulls"), "pulls": Limits(3, -9.5, 9.5, shortest=1)},
)
SEEDS, PULLS = torch.tensor([4095, 0, 0], dtype=torch.int16), torch.tensor([9.5, -9.5, 0.0])


def slopes_in(seeds: torch.Tensor = SEEDS, pulls: torch.Tensor = PULLS, **more: torch.Tensor) -> Answer:
    """Let in as an answer to SLOPES."""
    answer = Answer(vectors({"seeds": seeds, "pulls": pulls, **more}), weight=7.0)
    return admit(pack_answer(answer, HEADER), "3.0", CLIENT, LIKE, 100.0, ask=SLOPES)


def test_vectors_within_their_limits_come_in_as_they_were_sent() -> None:
    """At every limit: three of three, the first and the last seed, one of them twice, the clip from both sides."""
    given = slopes_in().payload.tensors
    assert torch.equal(given["seeds"], SEEDS)
    assert torch.equal(given["pulls"], PULLS)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_seeds_come_as_whole_numbers_of_any_size(dtype: torch.dtype) -> None:
    assert slopes_in(torch.tensor([7], dtype=dtype), torch.ones(1)).payload.tensors["seeds"].dtype is dtype


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"pulls": spoilt(PULLS, math.nan)}, "'pulls' is not finite"),
        ({"pulls": spoilt(PULLS, -math.inf)}, "'pulls' is not finite"),
        ({"pulls": spoilt(PULLS, 9.75)}, "'pulls' holds 9.75, beyond 9.5$"),
        ({"pulls": spoilt(PULLS, -1e30)}, r"'pulls' holds -1e\+30, below -9.5$"),
        ({"seeds": spoilt(SEEDS, 5000)}, "'seeds' holds 5000, beyond 4095$"),
        ({"seeds": spoilt(SEEDS, -1)}, "'seeds' holds -1, below 0$"),
        ({"seeds": torch.tensor([2**62 + 1, 0, 0])}, f"'seeds' holds {2**62 + 1}, beyond 4095$"),
        ({"seeds": torch.zeros(3)}, "'seeds' came as float32, wanted integers"),
        ({"seeds": torch.zeros(4, dtype=torch.int16)}, "'seeds' holds 4 numbers: too many, wanted at most 3"),
        ({"pulls": torch.zeros(30)}, "'pulls' holds 30 numbers: too many, wanted at most 3"),
        ({"pulls": torch.zeros(2)}, "'seeds' and 'pulls' hold 3 and 2 numbers, wanted as many of both"),
        ({"seeds": SEEDS[:0], "pulls": PULLS[:0]}, "'pulls' holds 0 numbers: too few, wanted at least 1"),
        ({"pulls": PULLS[:, None]}, r"'pulls' is of shape \(3, 1\), wanted numbers in one row"),
        ({"pulls": PULLS[0]}, r"'pulls' is of shape \(\), wanted numbers in one row"),
        ({"seeds": SEEDS[None]}, r"'seeds' is of shape \(1, 3\), wanted numbers in one row"),
        ({"seeds": SEEDS[0]}, r"'seeds' is of shape \(\), wanted numbers in one row"),
        ({"norms": torch.ones(1)}, "its vectors norms were not asked for, wanted pulls, seeds"),
    ],
)
def test_vectors_beyond_their_limits_are_refused(given: Mapping[str, torch.Tensor], reason: str) -> None:
    with pytest.raises(Refused, match=reason):
        slopes_in(**given)


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (Payload(), "it lacks the vectors pulls, seeds"),
        (vectors({"pulls": PULLS}), "it lacks the vectors seeds"),
        (Payload({"seeds": SEEDS, "pulls": PULLS}, {"seeds": Role.VECTOR, "pulls": Role.DENSE}), "it lacks the vectors pulls"),
    ],
)
def test_vectors_that_were_asked_for_must_be_there(payload: Payload, reason: str) -> None:
    with pytest.raises(Refused, match=reason):
        admit(pack_answer(Answer(payload), HEADER), "3.0", CLIENT, LIKE, 100.0, ask=SLOPES)


@pytest.mark.parametrize(
    "more", [Payload(scalars={"x": 1.0}), payload_of(Adapter({"q": Factors(torch.ones(2, 3), torch.ones(5, 2), 1.5)}))]
)
def test_beside_vectors_that_were_asked_for_there_is_nothing(more: Payload) -> None:
    told = vectors({"seeds": SEEDS, "pulls": PULLS})
    payload = Payload({**told.tensors, **more.tensors}, {**told.roles, **more.roles}, more.scalars)
    envelope = pack_answer(Answer(payload, weight=7.0), HEADER)
    with pytest.raises(Refused, match="were not asked for, wanted pulls, seeds alone"):
        admit(envelope, "3.0", CLIENT, LIKE, 100.0, ask=SLOPES)


def test_whoever_took_fewer_steps_is_no_misfit() -> None:
    few, many = schema_of(slopes_in(SEEDS[:1], PULLS[:1]), Fold.EACH), schema_of(slopes_in(), Fold.EACH)
    assert misfits({"ann": few, "bob": many, "cy": many}) == {}


@pytest.mark.parametrize(("wants", "lacks"), [((Role.A, Role.B), None), ((Role.CORE,), "q.lora_R"), (ADAPTER, "head.weight")])
def test_what_was_asked_for_must_be_there(wants: tuple[Role, ...], lacks: str | None) -> None:
    """GOOD has both factors of q and its scale; the job's head is another's."""
    like = replace(LIKE, dense={"head.weight": torch.zeros(2)})
    pair = Factors(torch.ones(2, 3), torch.ones(5, 2), 1.5)
    envelope = pack_answer(replace(GOOD, payload=payload_of(Adapter({"q": pair}))), HEADER)
    with nullcontext() if lacks is None else pytest.raises(Refused, match=f"it lacks {lacks}"):
        admit(envelope, "3.0", CLIENT, like, 100.0, ask=Ask("train", wants=wants))


Q, HEAD, OWN = "q.weight", "head", "l0.weight"
PARTS = Ask(
    "train",
    fold=Fold.SEEN,
    vectors={"gain": Limits(1, -1.0, 1.0, shortest=1)},
    tensors={"ann": (OWN, HEAD), "bob": (Q, HEAD), "cy": ()},
)
MODEL = {OWN: (2, 2), Q: (5, 3), HEAD: (4, 3), "norm": (3,)}  # the whole model's own weights
TRAINED = {OWN: torch.ones(2, 2), HEAD: torch.ones(4, 3)}
GAIN = {"gain": torch.ones(1)}


def parts_in(
    tensors: Mapping[str, torch.Tensor] = TRAINED,
    told: Mapping[str, torch.Tensor] = GAIN,
    role: Role = Role.DENSE,
    scalars: Mapping[str, float] | None = None,
    client: str = "ann",
    ask: Ask = PARTS,
) -> Answer:
    """Let in as an answer to PARTS."""
    roles = {**dict.fromkeys(tensors, role), **dict.fromkeys(told, Role.VECTOR)}
    answer = Answer(Payload({**tensors, **told}, roles, scalars or {}), weight=7.0)
    return admit(pack_answer(answer, HEADER), "3.0", replace(CLIENT, id=client), LIKE, 100.0, ask=ask, shapes=MODEL)


def test_each_client_sends_the_tensors_that_were_asked_of_it() -> None:
    assert parts_in().payload.tensors.keys() == {OWN, HEAD, "gain"}
    assert parts_in({Q: torch.ones(5, 3), HEAD: torch.ones(4, 3)}, client="bob").payload.tensors.keys() == {Q, HEAD, "gain"}
    assert parts_in({}, client="cy").payload.tensors.keys() == {"gain"}
    assert parts_in(told={}, ask=replace(PARTS, vectors={})).payload.tensors.keys() == {OWN, HEAD}


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"tensors": {}}, "it lacks head, l0.weight$"),
        ({"tensors": {HEAD: torch.ones(4, 3)}}, "it lacks l0.weight$"),
        ({"tensors": {Q: torch.ones(5, 3), HEAD: torch.ones(4, 3)}}, "it lacks l0.weight$"),  # bob's layer in place of ann's
        ({"tensors": {**TRAINED, Q: torch.ones(5, 3)}}, "q.weight were not asked of it$"),
        ({"tensors": {**TRAINED, "norm": torch.ones(3)}}, "norm were not asked of it$"),
        ({"tensors": {**TRAINED, "x": torch.ones(3)}}, "x were not asked of it$"),
        ({"client": "cy"}, "head, l0.weight were not asked of it$"),
        ({"client": "dee"}, "head, l0.weight were not asked of it$"),  # of whom nothing was asked
        ({"scalars": {"q.scale": 1.5}}, "q.scale were not asked of it$"),
        ({"scalars": {"x": 1.0}}, "x were not asked of it$"),
        ({"tensors": {**TRAINED, OWN: torch.ones(4)}}, r"'l0.weight' is of shape \(4,\), wanted \(2, 2\)"),
        ({"tensors": {**TRAINED, HEAD: torch.ones(3, 4)}}, r"'head' is of shape \(3, 4\), wanted \(4, 3\)"),
        ({"tensors": {**TRAINED, OWN: torch.ones(2, 2).int()}}, "'l0.weight' came as int32, wanted float32"),
        ({"tensors": {**TRAINED, OWN: spoilt(torch.ones(2, 2), math.nan)}}, "'l0.weight' is not finite"),
        ({"role": Role.A}, "came as lora_A, wanted dense"),
        ({"role": Role.VECTOR}, "its vectors head, l0.weight were not asked for"),
        ({"told": {}}, "it lacks the vectors gain"),
        ({"told": {"gain": torch.tensor([1.5])}}, "'gain' holds 1.5, beyond 1"),
        ({"told": {**GAIN, "norm": torch.ones(3)}}, "its vectors norm were not asked for"),
    ],
)
def test_what_was_not_asked_of_this_client_is_refused(given: dict[str, Any], reason: str) -> None:
    with pytest.raises(Refused, match=reason):
        parts_in(**given)


def test_beside_named_tensors_a_vector_needs_to_be_asked_for() -> None:
    """Under the name of a weight it would else be folded into what others have trained."""
    for name in (Q, "norm"):
        with pytest.raises(Refused, match=f"{name} were not asked of it$"):
            parts_in(told={name: torch.ones(MODEL[name])}, ask=replace(PARTS, vectors={}))


def test_factors_are_named_as_whole_parameters_are() -> None:
    """Without their scales, which the server knows."""
    ask = Ask("train", tensors={"ann": ("q.lora_A", "q.lora_B")})
    factors = payload_of(Adapter({"q": PAIR}))
    bare = pack_answer(Answer(replace(factors, scalars={}), 7.0), HEADER)
    assert admit(bare, "3.0", CLIENT, LIKE, 100.0, ask=ask).payload.tensors.keys() == {"q.lora_A", "q.lora_B"}
    with pytest.raises(Refused, match=r"q.scale were not asked of it"):
        admit(pack_answer(Answer(factors, 7.0), HEADER), "3.0", CLIENT, LIKE, 100.0, ask=ask)
