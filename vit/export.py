"""Networks as files that run without our code: torch.export programs and ONNX, at one image size.

What depends on the weights alone is computed at export and stored: the positions of the size's
grid, whose resampling breaks runtimes, and the filters and matrices that octic layers expand. The
batch stays free. Nothing but PyTorch's own operators remains: a package that defines others spells
them out while `torch.compiler.is_exporting()`.

Letters: B images, D channels, h w a grid of patches.
"""

import io
import json
import operator
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from vit.backbone import eval_mode

OUTPUTS = ("features", "logits")
TOLERANCE = 1e-4
METADATA = "metadata.json"
# What a process that runs an export must not need.
OURS = ("octic", "vit", "baselines", "timm", "evaluation", "utils")
LARGEST_ONNX_BYTES = 1_900_000_000  # protobuf's own bound is 2 GiB; beyond, weights lie beside


class _Asked(nn.Module):
    """The part of a Backbone's output that is exported, under plain names."""

    def __init__(self, net: nn.Module, output: str) -> None:
        super().__init__()
        self.net, self.output = net, output

    def forward(self, images: Tensor) -> Any:
        if self.output == "logits":
            return self.net(images)
        cls, patches = self.net.features(images)[0]
        return {"cls": cls} if patches is None else {"cls": cls, "patches": patches}


def trace(net: nn.Module, *, size: int | tuple[int, int], output: str) -> ExportedProgram:
    """A program of images [B C H W] of one size, any B: PyTorch's operators and constants alone.

    output: "logits", what `net(images)` returns, or "features", a dictionary of `cls` [B D] and
    `patches` [B h w D] of the last block. Raises ValueError where the net does not take this size
    or where its own code fixes the batch.
    """
    if output not in OUTPUTS:
        raise ValueError(f"unknown output {output!r}; known: {', '.join(OUTPUTS)}")
    asked = _Asked(net, output)
    images = example_images(net, size, batch=2)
    with eval_mode(asked), torch.no_grad():
        _try(asked, images)
        program = _export(asked, images)
        module = _as_module(program)
        if _writes_to_constants(module.graph):
            # A folded constant is a copy, which no later write would reach.
            module = _as_module(program.run_decompositions({}))
        program = _export(_fold_constants(module), images)
    foreign = foreign_operators(program)
    if foreign:
        raise ValueError(
            f"operators that PyTorch alone does not know: {', '.join(foreign)}; "
            "their package must spell them out while torch.compiler.is_exporting()"
        )
    return program


def example_images(net: nn.Module, size: int | tuple[int, int], *, batch: int) -> Tensor:
    """Random images [B C H W] in the net's dtype, the same in every call; on the CPU."""
    height, width = (size, size) if isinstance(size, int) else size
    parameter = next(net.parameters())
    channels = getattr(net, "in_chans", 3)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, channels, height, width, generator=generator)
    return images.to(parameter)


def foreign_operators(program: ExportedProgram) -> list[str]:
    """Operators of a program that are not PyTorch's own."""
    own = {"aten", "prim", "prims"}
    targets = {node.target for node in program.graph.nodes if node.op == "call_function"}
    overloads = [target for target in targets if isinstance(target, torch._ops.OpOverload)]
    return sorted(str(target) for target in overloads if target.namespace not in own)


def save_program(program: ExportedProgram, path: Path, metadata: Mapping[str, object]) -> None:
    """Write a .pt2; `torch.export.load(path).module()` runs it."""
    torch.export.save(program, path, extra_files={METADATA: json.dumps(metadata)})


def save_onnx(program: ExportedProgram, path: Path, metadata: Mapping[str, object]) -> None:
    """Write an .onnx file (packages onnx, onnxscript), large weights as `<name>.data` beside it."""
    spec = program.call_spec.out_spec
    outputs = list(spec.context) if spec is not None and spec.context else ["logits"]
    written = torch.onnx.export(
        program,
        (),
        dynamo=True,
        verbose=False,
        input_names=["images"],
        output_names=outputs,
        dynamic_shapes=({0: "batch"},),
    )
    assert written is not None
    for key, value in metadata.items():
        written.model.metadata_props[key] = value if isinstance(value, str) else json.dumps(value)
    weights = sum(tensor.nbytes for tensor in program.state_dict.values())
    written.save(str(path), external_data=weights > LARGEST_ONNX_BYTES)


def largest_difference(
    path: Path, net: nn.Module, *, size: int | tuple[int, int], output: str
) -> float:
    """How far a written file is from the net: max |difference| / max |output|, at B = 1 and 3.

    The file is loaded and run by a process of its own, which cannot import our packages.
    """
    asked = _Asked(net, output)
    batches = [example_images(net, size, batch=batch) for batch in (1, 3)]
    found = _run_elsewhere(path, batches)
    worst = 0.0
    with eval_mode(asked), torch.no_grad():
        for images, theirs in zip(batches, found, strict=True):
            ours = asked(images)
            ours = list(ours.values()) if isinstance(ours, dict) else [ours]
            for one, other in zip(ours, theirs, strict=True):
                worst = max(worst, relative_difference(one, other))
    return worst


def relative_difference(ours: Tensor, theirs: Tensor) -> float:
    """Max |difference| / max |output|; infinite for other shapes, and where any is not finite."""
    if ours.shape != theirs.shape or not bool((ours - theirs).isfinite().all()):
        return float("inf")
    scale = ours.abs().max().clamp_min(torch.finfo(ours.dtype).tiny)
    return float((ours - theirs).abs().max() / scale)


_RUNNER = f"""
import sys
sys.modules.update(dict.fromkeys({OURS}))
import torch
path, given, found = sys.argv[1:]
batches = torch.load(given)
if path.endswith(".onnx"):
    import onnxruntime
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    run = lambda images: [
        torch.from_numpy(out) for out in session.run(None, {{"images": images.numpy()}})
    ]
else:
    module = torch.export.load(path).module()
    def run(images):
        out = module(images)
        return list(out.values()) if isinstance(out, dict) else [out]
with torch.no_grad():
    torch.save([run(images) for images in batches], found)
"""


def _run_elsewhere(path: Path, batches: Sequence[Tensor]) -> list[list[Tensor]]:
    with tempfile.TemporaryDirectory() as folder:
        given, found = Path(folder) / "given.pt", Path(folder) / "found.pt"
        torch.save(list(batches), given)
        # Isolated (-I): neither the folder we are in nor PYTHONPATH may lead to our code.
        command = [
            sys.executable,
            "-I",
            "-c",
            _RUNNER,
            str(path.absolute()),
            str(given),
            str(found),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise ValueError(f"{path} does not run in a process of its own: {last}")
        return torch.load(found)


def _try(asked: nn.Module, images: Tensor) -> None:
    # The net's own complaint about a size is clearer than the exporter's.
    try:
        asked(images)
    except (ValueError, AssertionError, RuntimeError) as error:
        size = " x ".join(str(side) for side in images.shape[-2:])
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"the net does not take {size} images: {reason}") from error


def _export(module: nn.Module, images: Tensor) -> ExportedProgram:
    batch, said = torch.export.Dim("batch", min=1), io.StringIO()
    try:
        # Before that error torch prints the whole graph, which says nothing to a user.
        with redirect_stderr(said):
            return torch.export.export(module, (images,), dynamic_shapes=({0: batch},))
    except GuardOnDataDependentSymNode as error:
        said.truncate(0)
        raise ValueError(
            "the net's shapes or its course depend on what is in the images, as where a reducer "
            "counts the tokens it keeps; no program can say that"
        ) from error
    except RuntimeError as error:
        if "batch" in str(error) and "specialized it to be a constant" in str(error):
            raise ValueError(
                "the net's code fixes the number of images, by len(images) or int(...) on a size; "
                "images.shape[0] leaves it free"
            ) from error
        raise
    finally:
        print(said.getvalue(), end="", file=sys.stderr)


def _as_module(program: ExportedProgram) -> fx.GraphModule:
    module = program.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    return module


def _writes_to_constants(graph: fx.Graph) -> bool:
    """Whether an operator takes a constant, or what depends on constants alone, to change it."""
    known: set[fx.Node] = set()
    for node in graph.nodes:
        inputs, target = node.all_input_nodes, node.target
        writes = isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable
        if writes and inputs and inputs[0] in known:
            return True
        if node.op == "get_attr" or (inputs and known.issuperset(inputs)):
            known.add(node)
    return False


def _fold_constants(module: fx.GraphModule) -> fx.GraphModule:
    """All that depends on constants alone as constants."""
    graph, known = module.graph, {}
    for node in list(graph.nodes):
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            graph.erase_node(node)  # it would keep alive what it looks at
            continue
        inputs = node.all_input_nodes
        if node.op == "get_attr":
            known[node] = operator.attrgetter(str(node.target))(module)
        elif node.op == "call_function" and inputs and all(part in known for part in inputs):
            args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
            known[node] = node.target(*args, **kwargs)
    for node in list(graph.nodes):
        read = node in known and any(user not in known for user in node.users)
        if read and node.op == "call_function":
            constant = known[node].detach().clone(memory_format=torch.contiguous_format)
            module.register_buffer(f"constant_{node.name}", constant)
            with graph.inserting_before(node):
                node.replace_all_uses_with(graph.get_attr(f"constant_{node.name}"))
    graph.eliminate_dead_code()
    module.delete_all_unused_submodules()
    module.recompile()
    return module
