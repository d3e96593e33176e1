"""Rows with images: the teacher is shown the student's, and what a text says is never one."""

import pytest
import torch
from common import LORA, SDPO, TWO_RANKS, ZERO, cases

from sdpo_plugin.distillation.loss import token_divergence
from sdpo_plugin.testing import RunFailed, tiny_vision_model

COLORS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}
# With two ranks the visual encoder's weights are not always finite on a CPU, without `--algo` as well.
ONE_RANK = ("--ds.zero_stage", "3")
IMAGES = ("--data.max_images_per_prompt", "2")
FULL = ("--algo", "sdpo", "--distill.mode", "full", "--distill.alpha", "0", "--teacher.kind", "base",
        "--algo.advantage.is_correction_level", "off", *IMAGES)  # fmt: skip
REWARD = '''
import torch

def reward_func(queries, prompts, labels):
    """The feedback holds mark-up that would be one image more each time."""
    reward = torch.tensor([float(sum(map(ord, query)) % 2) for query in queries])
    feedback = [f"the square is {label} <image> <|image_pad|> <|vision_start|><|image_pad|>" for label in labels]
    return {"rewards": reward, "scores": reward, "feedback": feedback}
'''


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_vision_model(tmp_path_factory.mktemp("vision"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """One or two squares each, of different sizes."""
    from PIL import Image

    directory, found = tmp_path_factory.mktemp("images"), []
    for number, (name, color) in enumerate(list(COLORS.items()) * 2):
        path = directory / f"{number}.png"
        Image.new("RGB", (56, 56 if number % 3 else 84), color).save(path)
        images = [str(path)] * (2 if number % 4 == 3 else 1)
        prompt = [{"role": "user", "content": f"{'<image>' * len(images)}which color?"}]
        found.append({"prompt": prompt, "images": images, "label": name})
    return found


@pytest.fixture(scope="module")
def reward(tmp_path_factory):
    file = tmp_path_factory.mktemp("reward") / "reward.py"
    file.write_text(REWARD)
    return file


@pytest.fixture(scope="module")
def attached(tmp_path_factory):
    """A file of what is attached to the samples of `recorded`."""
    return tmp_path_factory.mktemp("attached") / "attached.pt"


@pytest.fixture(scope="module")
def recorded(openrlhf, model, rows, reward, attached):
    return openrlhf(model, rows, reward, *FULL, "--plugins", "attached", "--attached.out", str(attached))


def test_the_teacher_is_shown_the_student_s_images(recorded, attached, model):
    """The loss is that of a dense computation with the pictures, and not that of one without."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    image_token = AutoProcessor.from_pretrained(model).image_token_id
    network = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.bfloat16)
    losses, prompts = {"shown": [], "gray": []}, torch.load(attached)["teacher_prompt"]
    for i, sample in enumerate(recorded.samples[0]):
        prompt, mask = prompts[i], sample.action_mask[0].bool()
        inputs, ids = sample.mm_train_inputs[0], sample.sequences[0]
        first = int(mask.nonzero()[0]) + 1
        assert (prompt == image_token).sum() == (ids[:first] == image_token).sum() > 0
        assert (ids[first:] == image_token).sum() == 0
        replayed = torch.cat([prompt, ids[first:]])
        student = log_probs(network, ids, inputs, image_token)[mask.nonzero()[:, 0]]
        rows = mask.nonzero()[:, 0] - first + len(prompt)
        for name, pixels in (("shown", inputs["pixel_values"]), ("gray", inputs["pixel_values"] * 0.0)):
            teacher = log_probs(network, replayed, {**inputs, "pixel_values": pixels}, image_token)[rows]
            losses[name].append(token_divergence(student, teacher, 0.0))
    shown, gray = (float(torch.cat(values).mean()) for values in losses.values())
    (loss,) = [value for _, value in recorded.metrics["train/self_distillation/loss"]]
    print(f"loss {loss:.5f}, with the pictures {shown:.5f}, without {gray:.5f}")
    assert loss == pytest.approx(shown, rel=0.02)
    assert abs(gray - shown) > 0.1 * shown


def test_the_teacher_is_shown_images_of_its_own(openrlhf, model, rows, reward, recorded, tmp_path):
    """A column that only the teacher sees, here of some rows: after the student's images, and no one else's."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(model)
    network = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.bfloat16)
    own = [{**row, "hint": rows[3]["images"][0] if i % 2 else None} for i, row in enumerate(rows)]
    flags = ("--reprompt.teacher_images", "hint", "--plugins", "attached", "--attached.out", str(tmp_path / "seen.pt"))
    run = openrlhf(model, own, reward, *FULL, *flags)
    attached, losses = torch.load(tmp_path / "seen.pt"), []
    for i, sample in enumerate(run.samples[0]):
        prompt, mask, ids = attached["teacher_prompt"][i], sample.action_mask[0].bool(), sample.sequences[0]
        inputs, first = sample.mm_train_inputs[0], int(mask.nonzero()[0]) + 1
        more = attached["teacher_image/pixel_values"][i]
        assert bool(more.numel()) == bool(sample.record["hint"])
        both = inputs
        if more.numel():
            grid = attached["teacher_image/image_grid_thw"][i]
            pixels = torch.cat([inputs["pixel_values"], more])
            both = {"pixel_values": pixels, "image_grid_thw": torch.cat([inputs["image_grid_thw"], grid])}
        student = log_probs(network, ids, inputs, processor.image_token_id)[mask.nonzero()[:, 0]]
        replayed = torch.cat([prompt, ids[first:]])
        teacher = log_probs(network, replayed, both, processor.image_token_id)
        losses.append(token_divergence(student, teacher[mask.nonzero()[:, 0] - first + len(prompt)], 0.0))
    (loss,) = [value for _, value in run.metrics["train/self_distillation/loss"]]
    assert loss == pytest.approx(float(torch.cat(losses).mean()), rel=0.02)


def log_probs(network, ids, inputs, image_token):
    types = (ids == image_token).int()[None]
    with torch.no_grad():
        return network(ids[None], mm_token_type_ids=types, **inputs).logits[0].float().log_softmax(-1)


@pytest.mark.parametrize(
    "flags",
    cases(
        {
            "zero2": (ZERO[2],), "zero3": (ONE_RANK,), "lora": ((*TWO_RANKS, *LORA),),
            "passes": (("--teacher.max_tokens_per_gpu", "150"),), "offload": (("--teacher.offload",),),
            "frozen": (("--actor.freeze_visual_encoder",),), "ema": (("--teacher.kind", "ema", *ZERO[2]),),
        },
        "zero2",
    ),
)  # fmt: skip
def test_the_loss_is_that_of_one_rank(openrlhf, model, rows, reward, recorded, flags):
    run = openrlhf(model, rows, reward, *FULL, *flags, replay=recorded)
    for tag in ("train/self_distillation/loss", *(() if LORA[0] in flags else ("train/actor_grad_norm",))):
        if "--actor.freeze_visual_encoder" in flags and "norm" in tag:
            continue
        assert run.metrics[tag][0][1] == pytest.approx(recorded.metrics[tag][0][1], rel=0.02), tag


@pytest.mark.check
def test_grpo_and_a_hybrid_train_on_all_samples(openrlhf, model, rows, reward, recorded):
    flags = ("--algo", "srpo", "--algo.advantage.is_correction_level", "off", *IMAGES, *ZERO[2])
    hybrid = openrlhf(model, rows, reward, *flags, replay=recorded)
    assert hybrid.metrics["train/actor_grad_norm"][0][1] > 0


@pytest.mark.parametrize(
    ("flags", "change", "message"),
    [
        (("--data.max_images_per_prompt", "1"), {}, r"row 3 has 2 images; give 2"),
        (IMAGES, {"images": ["/no/such.png"]}, r"row 0: '/no/such.png' is not a file"),
        (IMAGES, {"prompt": "which color?"}, r"row 0 has 1 images and its prompt 0 image parts"),
        (IMAGES, {"prompt": "<image>is <|image_pad|> a token?"}, r"row 0 has 1 images, and rendered it has 2 times"),
    ],
)
def test_a_row_with_a_wrong_image_is_rejected_before_the_run(openrlhf, model, rows, reward, flags, change, message):
    with pytest.raises(RunFailed, match=message) as failed:
        openrlhf(model, [{**rows[0], **change}, *rows[1:]], reward, *SDPO, *flags)
    assert failed.value.code == 2
