"""Images in prompts: what a processor makes of them, and what stays text."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sdpo_plugin.config import ConfigError, RepromptConfig
from sdpo_plugin.distillation.context import Rollout, build_teacher_contexts
from sdpo_plugin.distillation.images import image_parts, media_tokens, with_runs, with_tags_as_parts
from sdpo_plugin.distillation.prompts import prompt_as_scored, rendered, require_user_text
from sdpo_plugin.distillation.teacher_prompt import teacher_prompt_ids
from sdpo_plugin.environments.feedback import response_of
from sdpo_plugin.interface.scoring import ScoringRequest, teacher_inputs
from sdpo_plugin.testing import tiny_vision_model

QUESTION = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "and "}, {"type": "image"},
             {"type": "text", "text": "which?"}]}]  # fmt: skip


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(tiny_vision_model(tmp_path_factory.mktemp("vision")))


@pytest.fixture(scope="module")
def read(processor):
    """The student's ids of `QUESTION` with two pictures of different size, and what the processor made of these."""
    from PIL import Image

    pictures = [Image.new("RGB", (56, 56)), Image.new("RGB", (28, 84))]
    found = processor(text=[rendered(QUESTION, processor)], images=pictures, add_special_tokens=False)
    return found["input_ids"][0], {name: torch.tensor(found[name]) for name in ("pixel_values", "image_grid_thw")}


def test_a_prompt_with_its_runs_is_what_the_student_read(processor, read):
    ids, inputs = read
    prompt = with_runs(QUESTION, processor, inputs, ids)
    assert processor.tokenizer(rendered(prompt, processor), add_special_tokens=False)["input_ids"] == ids
    assert sum(token in media_tokens(processor) for token in ids) == 4 + 3
    assert prompt_as_scored(prompt, ids, processor, text=rendered(QUESTION, processor)) is prompt


@settings(deadline=None)
@given(st.text(st.sampled_from("ab <image>|_pdvsontre"), max_size=80))
def test_feedback_never_adds_an_image(processor, read, feedback):
    ids, inputs = read
    prompt = with_runs(QUESTION, processor, inputs, ids)
    text = f"<image>{feedback}<|image_pad|><|vision_start|><|image_pad|>"
    for config in (RepromptConfig(), RepromptConfig(max_len=60)):
        (context,) = build_teacher_contexts([Rollout(0, prompt, "no", 0.0, text)], config)
        found, _ = teacher_prompt_ids(context, processor, config)
        assert [i for i in found if i in media_tokens(processor)] == [i for i in ids if i in media_tokens(processor)]


@settings(deadline=None)  # the first one imports OpenRLHF
@given(st.lists(st.sampled_from(["<image>", "a", " ", "<", "image>"]), max_size=8).map("".join))
def test_tags_become_parts_as_in_openrlhf(text):
    from openrlhf.datasets.prompts_dataset import _str_to_content_list

    found = with_tags_as_parts([{"role": "user", "content": text}])
    assert found == [{"role": "user", "content": _str_to_content_list(text)}]
    assert len(image_parts(found)) == text.count("<image>")


def test_a_placeholder_in_a_text_is_named(processor, read):
    ids, inputs = read
    asked = [{"role": "user", "content": [*QUESTION[0]["content"], {"type": "text", "text": "is <|image_pad|> one?"}]}]
    with pytest.raises(ConfigError, match=r"2 images, and rendered it has 3 times <\|image_pad\|>"):
        rendered(with_runs(asked, processor, inputs, ids), processor)


def test_parts_that_are_images_need_the_flag():
    require_user_text("row 0", QUESTION, images=True)
    with pytest.raises(ConfigError, match="row 0 has a part that is not text.*--data.max_images_per_prompt"):
        require_user_text("row 0", QUESTION)
    with pytest.raises(ConfigError, match="a part that is not text"):
        video = [{"type": "video"}, {"type": "text", "text": "?"}]
        require_user_text("row 0", [{"role": "user", "content": video}], images=True)


def test_all_of_a_sample_with_images_is_replayed():
    """An agent's later images must be there, whichever of its turns is scored."""
    sequences = torch.tensor([[5, 6, 7, 8, 9, 0], [5, 6, 7, 0, 0, 0]])
    action = torch.tensor([[0, 1, 0, 1, 0], [0, 1, 0, 0, 0]]).bool()
    mask = torch.tensor([False, True, False, False, False])
    request = ScoringRequest(0, torch.tensor([1, 2, 3]), mask)
    assert teacher_inputs(sequences, action, [request])[0].tolist() == [[1, 2, 3, 7]]
    assert teacher_inputs(sequences, action, [request], [5, 3])[0].tolist() == [[1, 2, 3, 7, 8, 9]]
    assert teacher_inputs(sequences, action, [], [5, 3])[0].tolist() == [[5, 6, 7, 8, 9]]


def test_the_response_to_a_picture_is_found(processor, read):
    """A query has a picture's tokens, where the prompt that a reward function is given has one placeholder."""
    ids, _ = read
    query, prompt = processor.tokenizer.decode(ids) + "blue<eos>", rendered(QUESTION, processor)
    assert not query.startswith(prompt)
    assert response_of(query, prompt).removesuffix("<eos>") == "blue"


def test_a_tokenizer_has_no_media(processor):
    assert media_tokens(processor.tokenizer) == media_tokens(SimpleNamespace()) == set()
    assert media_tokens(processor) == {processor.image_token_id, processor.video_token_id}
