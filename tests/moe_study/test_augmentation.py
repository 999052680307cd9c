"""Random crops and flips, against a loop over pixels."""

import torch

from moe_study.tasks import augmented, drawn_crops


def test_crops_and_flips_against_a_loop():
    images = torch.randint(1, 256, (40, 3, 6, 5), dtype=torch.uint8)
    found = augmented(images, *drawn_crops(40, torch.Generator().manual_seed(3), border=2), border=2)
    draw = torch.Generator().manual_seed(3)
    offsets, flips = torch.randint(5, (2, 40), generator=draw), torch.rand(40, generator=draw) < 0.5
    assert found.shape == images.shape
    for n in range(40):
        for y in range(6):
            for x in range(5):
                column = 4 - x if flips[n] else x
                at_y, at_x = y + int(offsets[0, n]) - 2, column + int(offsets[1, n]) - 2
                inside = 0 <= at_y < 6 and 0 <= at_x < 5
                assert torch.equal(
                    found[n, :, y, x],
                    images[n, :, at_y, at_x] if inside else torch.zeros(3, dtype=torch.uint8),
                )
    assert flips.any()
    assert not flips.all()
