import math

import pytest
import torch

from onetorch.generative.sampling import probabilities, sample

LOGITS = torch.tensor([math.log(4.0), math.log(2.0), math.log(1.0), math.log(1.0)])


def test_probabilities_by_hand() -> None:
    assert probabilities(LOGITS).tolist() == pytest.approx([0.5, 0.25, 0.125, 0.125])
    assert probabilities(LOGITS, temperature=0.5).tolist() == pytest.approx([16 / 22, 4 / 22, 1 / 22, 1 / 22])  # squares of 4 2 1 1
    assert probabilities(LOGITS, top_k=2).tolist() == pytest.approx([4 / 6, 2 / 6, 0, 0])
    assert probabilities(LOGITS, temperature=0.5, top_k=2).tolist() == pytest.approx([0.8, 0.2, 0, 0])
    assert probabilities(LOGITS, top_k=3).tolist() == pytest.approx([0.5, 0.25, 0.125, 0.125])  # the third equals the fourth
    assert probabilities(LOGITS, temperature=0).tolist() == [1, 0, 0, 0]
    assert probabilities(LOGITS, top_k=100).tolist() == probabilities(LOGITS).tolist()


def test_frequencies_are_the_probabilities() -> None:
    drawn = sample(LOGITS.expand(20_000, 4), torch.Generator().manual_seed(0), top_k=2)
    assert drawn.max() == 1
    assert (drawn == 0).double().mean().item() == pytest.approx(2 / 3, abs=0.0134)  # four standard errors


@pytest.mark.parametrize("wrong", [
    {"temperature": -1.0}, {"temperature": math.nan}, {"temperature": math.inf}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}, {"min_p": -0.1},
])  # fmt: skip
def test_wrong_values_are_named(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        probabilities(LOGITS, **wrong)


def test_nucleus_and_least_share_by_hand() -> None:
    # 4 2 1 1 of 8
    assert probabilities(LOGITS, top_p=0.5).tolist() == [1, 0, 0, 0]  # the first reaches it
    assert probabilities(LOGITS, top_p=0.51).tolist() == pytest.approx([4 / 6, 2 / 6, 0, 0])
    assert probabilities(LOGITS, top_p=0.8).tolist() == pytest.approx([0.5, 0.25, 0.125, 0.125])  # the third equals the fourth
    assert probabilities(LOGITS, min_p=0.4).tolist() == pytest.approx([4 / 6, 2 / 6, 0, 0])
    assert probabilities(LOGITS, min_p=0.6).tolist() == [1, 0, 0, 0]
    assert probabilities(LOGITS, temperature=0.5, min_p=0.2).tolist() == pytest.approx([0.8, 0.2, 0, 0])  # 16 4 1 1 at the temperature
    assert probabilities(LOGITS.flip(0).expand(2, 4), top_p=0.7).tolist() == [pytest.approx([0, 0, 2 / 6, 4 / 6])] * 2
    assert probabilities(LOGITS, top_k=2, top_p=0.6).tolist() == [1, 0, 0, 0]  # 2/3 of what top_k left
