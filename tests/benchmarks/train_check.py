"""Whether a device trains as the CPU does: losses and gradients of one batch, without padding, against padded fp32;
beside it how far transformers is from the same reference, with the same weights under the same autocast.
"""

import argparse
from typing import Any

import torch

from s2s_ray.models.backbone import Backbone
from s2s_ray.models.bart import BartBackbone
from s2s_ray.models.loading import initialise
from s2s_ray.models.t5 import T5Backbone
from s2s_ray.training.batches import Batch
from s2s_ray.training.distributed import compile_layers
from s2s_ray.training.step import Totals, TrainStep
from tests.benchmarks.train import SHAPES, make_config, make_rows

ROWS, LAYERS = 12, 2
# Largest relative error of the loss and of any parameter's gradient (norm of the difference over norm).
TOLERANCES = {"fp32": (1e-5, 1e-3), "bf16": (1e-2, 0.05)}


def check(args: argparse.Namespace) -> dict[str, Any]:
    """BART (flash attention in bf16) and T5 (relative positions, never flash). Raises SystemExit when one differs."""
    args.rows = ROWS
    batch = make_rows(args).collate(range(ROWS), 8)
    results = []
    for name, backbone in (("bart", make_bart(args.shape)), ("t5", make_t5(args.shape))):
        reference = gradients(backbone, batch, "fp32")
        for precision in ("fp32", "bf16"):
            theirs = errors(peer_gradients(backbone, batch, args.device, precision), reference)
            print({"transformers": name, "precision": precision, **theirs}, flush=True)
        variants = [("fp32", False), ("bf16", False), *([("bf16", True)] if args.compiled_tokens else [])]
        for precision, compiled in variants:
            backbone.to(args.device)
            if compiled:
                compile_layers(backbone)
            found = gradients(backbone, batch.packed().to(torch.device(args.device)), precision)
            backbone.to("cpu")
            results.append({"model": name, "precision": precision, "compiled": compiled, **errors(found, reference)})
            print(results[-1], flush=True)
    for result in results:
        loss, gradient = TOLERANCES[result["precision"]]
        result["passed"] = result["loss"] <= loss and result["gradient"] <= gradient
    if not all(result["passed"] for result in results):
        raise SystemExit(f"losses or gradients differ: {results}")
    return {"benchmark": "train --check", "device": args.device, "results": results}


def gradients(backbone: Backbone, batch: Batch, precision: Any) -> dict[str, torch.Tensor]:
    """The loss and what one step of plain gradient descent subtracts, in fp32 on the CPU; without dropout."""
    backbone.eval()
    before = {name: p.detach().clone() for name, p in backbone.named_parameters()}
    totals = Totals()
    TrainStep(backbone, torch.optim.SGD(backbone.parameters(), lr=1.0), precision=precision)([batch], totals)
    found = {"loss": torch.tensor(totals.results()["loss"])}
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            found[name] = (before[name] - parameter).cpu()
            parameter.copy_(before[name])
    return found


def peer_gradients(backbone: Backbone, batch: Batch, device: str, precision: str) -> dict[str, torch.Tensor]:
    """transformers' loss and gradients by our names, on the CPU."""
    from transformers import AutoConfig, AutoModelForSeq2SeqLM

    names = {name: backbone.checkpoint_name(name) for name, _ in backbone.named_parameters()}
    peer = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(**backbone.config)).eval()
    peer.load_state_dict({names[name]: p.detach() for name, p in backbone.named_parameters()}, strict=False)
    peer.to(device)
    batch = batch.to(torch.device(device))
    with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
        loss = peer(
            input_ids=batch.inputs["encoder_token_ids"],
            attention_mask=batch.inputs["encoder_padding_mask"],
            decoder_input_ids=batch.inputs["decoder_token_ids"],
            labels=batch.labels.masked_fill(batch.weights == 0, -100),
        ).loss
    loss.backward()
    grads = {name: parameter.grad for name, parameter in peer.named_parameters()}
    return {"loss": loss.detach().cpu(), **{name: grads[theirs].cpu() for name, theirs in names.items()}}


def errors(found: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Relative errors; gradients far below the others (a softmax ignores what all keys share) count by the largest."""
    largest = max(float(x.norm()) / x.numel() ** 0.5 for name, x in reference.items() if name != "loss")
    relative = {
        name: float((found[name] - x).norm()) / max(float(x.norm()), 1e-2 * largest * x.numel() ** 0.5)
        for name, x in reference.items()
    }
    loss = relative.pop("loss")
    worst = max(relative, key=lambda name: relative[name])
    return {"loss": loss, "gradient": relative[worst], "worst": worst}


def make_bart(shape: str) -> Backbone:
    backbone = BartBackbone(make_config(shape) | {"encoder_layers": LAYERS, "decoder_layers": LAYERS})
    return drawn(backbone)


def make_t5(shape: str) -> Backbone:
    """With queries as small as T5 draws them, since it does not scale its scores: with others the softmax is so sharp
    that rounding to bf16 alone changes gradients by half, in transformers too (docs/performance.md).
    """
    d, _, _, ffn, heads, vocabulary = SHAPES[shape]
    config = {"model_type": "t5", "d_model": d, "d_kv": d // heads, "d_ff": ffn, "num_heads": heads,
              "num_layers": LAYERS, "vocab_size": vocabulary, "relative_attention_num_buckets": 32,
              "feed_forward_proj": "gated-gelu", "dropout_rate": 0.1}  # fmt: skip
    backbone = drawn(T5Backbone(config))
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            if name.endswith("query.weight"):
                parameter.mul_(config["d_kv"] ** -0.5)
    return backbone


def drawn(backbone: Backbone) -> Backbone:
    torch.manual_seed(0)
    initialise(backbone, 0.03)
    return backbone
