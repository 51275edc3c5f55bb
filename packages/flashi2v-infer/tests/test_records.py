from dataclasses import replace

import pytest

from flashi2v_infer.files.records import Source, differences, origin
from flashi2v_infer.settings import Request, SamplingSettings

SOURCE = Source("tiny", {"predictor": {"patch_size": (1, 2, 2), "eps": 1e-6}}, {"predictor": "blake2b:1"})
REQUEST = Request("a cat", "cat.png", "dark", seed=1, index=2, fps=8)


def test_what_a_video_was_made_from_differs_in_nothing_from_itself():
    first = origin(REQUEST, "sha256:1", SOURCE)
    made = {**first, "versions": {"torch": "2.6"}, "device": "npu:0", "first_frame_psnr": 30.0}
    assert differences(made, first) == []
    # The same picture and weights, elsewhere.
    elsewhere = origin(replace(REQUEST, image="b/cat.png"), "sha256:1", replace(SOURCE, name="b/tiny"))
    assert differences(made, elsewhere) == []


@pytest.mark.parametrize(
    ("request_", "contents", "source", "message"),
    [
        (replace(REQUEST, prompt="a dog"), "1", SOURCE, 'prompt was "a cat", is "a dog"'),
        (replace(REQUEST, negative_prompt=""), "1", SOURCE, 'negative_prompt was "dark", is ""'),
        (replace(REQUEST, seed=2), "1", SOURCE, "seed was 1, is 2"),
        (replace(REQUEST, fps=16), "1", SOURCE, "fps was 8, is 16"),
        (replace(REQUEST, settings=SamplingSettings(height=64)), "1", SOURCE, "settings.height was 480, is 64"),
        (REQUEST, "2", SOURCE, 'image_contents was "1", is "2"'),
        (REQUEST, "1", replace(SOURCE, weights={"predictor": "x"}), 'weights.predictor was "blake2b:1", is "x"'),
        (
            REQUEST,
            "1",
            replace(SOURCE, settings={"predictor": {"patch_size": (1, 2, 2), "eps": 0.1}}),
            "model_settings.predictor.eps was 1e-06, is 0.1",
        ),
        (REQUEST, "1", replace(SOURCE, settings={"ae": {"dtype": "bf16"}}), 'ae.dtype was null, is "bf16"'),
    ],
)
def test_every_fact_that_differs_is_named_with_both_values(request_, contents, source, message):
    (difference,) = differences(origin(REQUEST, "1", SOURCE), origin(request_, contents, source))
    assert message in difference
