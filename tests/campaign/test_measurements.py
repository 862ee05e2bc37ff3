"""What was measured stays with its place, whatever was lost."""

import pytest

from stemloop.campaign.loop import Measurements

LOST = {"value": [None, None], "sigma": [None, None], "lost": True}
KEPT = {"value": [1.0, 2.0, None], "sigma": [0.1, 0.1, None], "descriptors": {"mean": [[10.0], [20.0], [30.0]]}}


@pytest.mark.parametrize("order", ["lost first", "lost last", "lost between"])
def test_descriptors_stay_with_their_places_when_a_batch_is_lost(order):
    data = Measurements()
    batches = {
        "lost first": [([7, 8], LOST), ([1, 2, 3], KEPT)],
        "lost last": [([1, 2, 3], KEPT), ([7, 8], LOST)],
        "lost between": [([1, 2, 3], KEPT), ([7, 8], LOST), ([4, 5, 6], KEPT)],
    }
    for index, result in batches[order]:
        data.add(index, result)
    found = data.usable()
    assert data.lost == 2
    assert [int(i) for i in found["index"]][:2] == [1, 2]
    assert [row[0] for row in found["descriptors"]["mean"]] == [10.0 * value for value in found["value"]]
