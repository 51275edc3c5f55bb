import json
import shutil
import sys
from types import ModuleType

import pytest
from diffusers import FlowMatchEulerDiscreteScheduler

from flashi2v_infer import FlashI2VPipeline, InputError
from flashi2v_infer.model_index import check_model_index


@pytest.fixture
def changed(model_directory, tmp_path):
    """A pipeline directory with changes to its model_index.json; weights are not there."""
    index = json.loads((model_directory / "model_index.json").read_text())

    def change(**entries):
        (tmp_path / "model_index.json").write_text(json.dumps({**index, **entries}))
        return tmp_path

    return change


class Stranger(FlowMatchEulerDiscreteScheduler):
    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        raise AssertionError("code that a file names was run")


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (
            {"scheduler": ["stranger", "Stranger"]},
            r"scheduler is to be loaded as .*it must be a SchedulerMixin of diffusers",
        ),
        ({"scheduler": ["os", "system"]}, r"scheduler is to be loaded as \['os', 'system'\], of which nothing is run"),
        ({"scheduler": ["diffusers", "AutoencoderKLWan"]}, "scheduler is to be loaded as"),
        ({"scheduler": ["diffusers", "utils"]}, "scheduler is to be loaded as"),
        ({"scheduler": ["diffusers", ["a"]]}, "scheduler is to be loaded as"),
        ({"scheduler": "stranger"}, "scheduler is to be loaded as"),
        ({"transformer": ["flashi2v_model", "InputError"]}, "transformer is to be loaded as"),
        ({"tokenizer": ["stranger", "PreTrainedTokenizerFast"]}, "a PreTrainedTokenizerBase of transformers"),
        ({"text_encoder": ["transformers", "AutoModel"]}, "a UMT5EncoderModel or T5EncoderModel of transformers"),
        ({"safety": ["stranger", "Stranger"]}, "names safety, a part that a FlashI2V pipeline does not have"),
        ({"_class_name": ["stranger", "Stranger"]}, r"is of a \['stranger', 'Stranger'\], not of a FlashI2VPipeline"),
        ({"_class_name": "WanPipeline"}, "is of a 'WanPipeline', not of a FlashI2VPipeline"),
    ],
)
def test_a_directory_names_known_classes_only(changed, monkeypatch, entries, message):
    module = ModuleType("stranger")
    module.Stranger = Stranger
    monkeypatch.setitem(sys.modules, "stranger", module)
    with pytest.raises(InputError, match=message):
        FlashI2VPipeline.from_pretrained(changed(**entries))


def test_code_beside_a_part_is_refused(changed):
    directory = changed()
    (directory / "scheduler").mkdir()
    (directory / "scheduler" / "diffusers.py").write_text("raise AssertionError")
    with pytest.raises(InputError, match=r"scheduler/diffusers.py is code, which is never run: remove it"):
        check_model_index(directory)


def test_any_scheduler_of_diffusers_and_missing_encoders_are_known(changed):
    check_model_index(changed(scheduler=["diffusers", "UniPCMultistepScheduler"]))
    check_model_index(changed(text_encoder=[None, None], tokenizer=[None, None], use_attention_mask=False))
    check_model_index(changed(tokenizer=["transformers", "T5TokenizerFast"]))


def test_a_tokenizer_of_the_directory_asks_nothing_and_runs_nothing(model_directory, tmp_path, monkeypatch):
    from flashi2v_infer.load import _load_tokenizer

    directory = shutil.copytree(model_directory / "tokenizer", tmp_path / "tokenizer")
    config = json.loads((directory / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", None]}}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "mine.py").write_text("raise AssertionError")
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("asked"))
    with pytest.raises(InputError, match=r"tokenizer.from_pretrained: .*holds no tokenizer"):
        _load_tokenizer(str(directory))
