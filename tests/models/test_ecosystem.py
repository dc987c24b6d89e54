"""The models are ordinary ones: what people do with a transformers model works."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

import checks
from checks_models import TWO_BACKBONES, make_model, shake, tokens
from mka.attention import ATTENTION_TYPES
from mka.models import build_model, checkpoint_blocks, mechanisms
from mka.models.modeling import MODELS

every_kind = pytest.mark.parametrize("kind", ATTENTION_TYPES)
two_backbones = pytest.mark.parametrize("backbone", TWO_BACKBONES)


def loss_and_gradients(
    model: Any, ids: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(ids, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.detach(), {
        name: p.grad for name, p in model.named_parameters() if p.grad is not None
    }


@every_kind
@two_backbones
def test_gradient_checkpointing_changes_nothing(kind: str, backbone: str) -> None:
    model, ids = make_model(backbone, kind, dtype=torch.float64).train(), tokens(2, 30)
    loss, grads = loss_and_gradients(model, ids)
    checkpoint_blocks(model)
    again, grads_again = loss_and_gradients(model, ids)
    checks.close(again, loss)
    assert grads.keys() == grads_again.keys()
    for name, grad in grads.items():
        checks.close(grads_again[name], grad)


@every_kind
@two_backbones
@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of itself
def test_the_training_forward_compiles_without_a_graph_break(kind: str, backbone: str) -> None:
    model, ids = make_model(backbone, kind).train(), tokens(2, 60)
    loss, grads = loss_and_gradients(model, ids)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    again, _ = loss_and_gradients(compiled, ids)
    checks.close(again, loss)
    for name, parameter in model.named_parameters():
        if name in grads:
            checks.close(parameter.grad, grads[name])


class Rows(Dataset[dict[str, torch.Tensor]]):
    def __init__(self, count: int) -> None:
        self.rows = tokens(count, 16)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


@pytest.mark.parametrize("kind", ["gqa", "mka", "fmka"])
@pytest.mark.filterwarnings("ignore")
def test_transformers_trainer(kind: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    model = make_model("llama", kind)
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=12,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        logging_steps=4,
        disable_tqdm=True,
        gradient_checkpointing=kind == "mka",
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=Rows(4), eval_dataset=Rows(4))
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before - 0.5
    trainer.save_model(str(tmp_path / "saved"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    ids = tokens(1, 9)
    checks.close(loaded(ids).logits, model.eval()(ids).logits)


@every_kind
@pytest.mark.filterwarnings("ignore")
def test_peft_lora_on_the_projections(kind: str) -> None:
    from peft import LoraConfig, get_peft_model

    model, ids = make_model("llama", kind), tokens(2, 20)
    before = model(ids, use_cache=False).logits
    targets = ["q_proj", "o_proj"] if kind == "mla" else ["q_proj", "k_proj", "v_proj", "o_proj"]
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM"))
    checks.close(adapted(ids, use_cache=False).logits, before)
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 2 * len(targets)
    torch.manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    whole = adapted(ids, use_cache=False).logits
    assert not torch.allclose(whole, before, atol=1e-3)
    cached = adapted(ids[:, :11], use_cache=True)
    rest = adapted(ids[:, 11:], past_key_values=cached.past_key_values, use_cache=True).logits
    checks.close(rest, whole[:, 11:])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["fmka", "mla"])
def test_lm_eval_on_a_saved_folder(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An offline task of our own, through lm-eval's hf class: a model that has learned it answers
    right."""
    from lm_eval import evaluator
    from lm_eval.tasks import TaskManager
    from transformers import LlamaConfig

    from checks_models import LLAMA
    from mka.data import load_tokenizer

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    questions = [
        {"text": f"the letter {a} is followed by", "answer": f" {b}"}
        for a, b in ["ab", "bc", "cd", "de"]
    ]
    data, task = tmp_path / "data.jsonl", tmp_path / "tasks" / "letters.yaml"
    data.write_text("\n".join(json.dumps(question) for question in questions))
    task.parent.mkdir()
    task.write_text(
        f"task: letters\ndataset_path: json\ndataset_kwargs:\n  data_files: {{test: "
        f"{data}}}\ntest_split: test\n"
        "output_type: multiple_choice\ndoc_to_text: '{{text}}'\ndoc_to_choice: [' a', ' b', ' "
        "c', ' d', ' e']\n"
        "doc_to_target: '{{answer}}'\ntarget_delimiter: ''\nmetric_list:\n  - metric: acc\n"
    )
    tokenizer = load_tokenizer("bpe", [q["text"] + q["answer"] for q in questions] * 9, 300)
    sizes: dict[str, Any] = LLAMA | {"vocab_size": tokenizer.vocab_size}
    model = build_model(LlamaConfig(**sizes, eos_token_id=tokenizer.eos_id), kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    rows = [torch.tensor([tokenizer.encode_batch([q["text"] + q["answer"]])[0]]) for q in questions]
    for _ in range(120):
        optimizer.zero_grad()
        torch.stack([model(row, labels=row, use_cache=False).loss for row in rows]).sum().backward()
        optimizer.step()
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    tokenizer.save(folder)
    arguments = {"pretrained": str(folder), "dtype": "float32", "device": "cpu"}
    evaluate: Any = evaluator.simple_evaluate
    done = evaluate(
        model="hf",
        model_args=arguments,
        tasks=["letters"],
        task_manager=TaskManager(include_path=str(task.parent)),
    )
    assert done["results"]["letters"]["acc,none"] == 1.0


def test_every_class_says_which_family_it_is() -> None:
    for family, model in MODELS.items():
        assert model.config_class.model_type == f"mka_{family}"
    assert len(mechanisms(shake(make_model("qwen3", "gqa")))) == 2
