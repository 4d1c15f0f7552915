"""Packages of the user's own: offered to configs where the environment names them, nowhere else."""

import pytest

from utils.config.build import build, check_targets, resolve
from utils.errors import UserError


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_nets.py").write_text(
        "import os\nfrom os.path import join\nfrom typing import Any\n\n\nclass Mine:\n"
        "    def __init__(self, width: int = 8):\n        self.width = width\n\n\n"
        "class Failing:\n    def __init__(self):\n        {}['label']\n\n\n"
        "class Pair:\n    def __init__(self, ends: tuple[float, float] | None,"
        " names: tuple[str, ...]):\n"
        "        self.ends = ends\n\n\n"
        "class Open:\n    def __init__(self, of: Any, many: list[Any]):\n        self.of = of\n"
    )


def test_what_the_environment_names_is_offered(monkeypatch):
    monkeypatch.setenv("OCTIC_PACKAGES", "another_one, my_nets")
    assert build({"_target_": "my_nets.Mine", "width": 16}).width == 16
    with pytest.raises(UserError, match=r"backbone: Mine takes no 'widht'; did you mean 'width'\?"):
        build({"backbone": {"_target_": "my_nets.Mine", "widht": 16}})


def test_what_a_network_does_not_take_is_told_with_what_it_takes(monkeypatch):
    monkeypatch.setenv("OCTIC_PACKAGES", "my_nets")
    node = {"backbone": {"_target_": "my_nets.Mine", "_partial_": True}}
    with pytest.raises(
        UserError, match=r"backbone: Mine takes no 'drop_path_rate' \(known: width\)$"
    ):
        build(node)["backbone"](drop_path_rate=0.1)
    node["backbone"] |= {"img_size": 32, "depth": 2}
    with pytest.raises(UserError, match=r"leave out.*: '~backbone.img_size' '~backbone.depth'"):
        build(node)
    del node["backbone"]["depth"]
    remedy = "'~backbone.img_size', or all of it: /parts/no_backbone in a run file$"
    with pytest.raises(UserError, match=remedy):
        build(node)


def test_what_a_function_behind_it_does_not_take_can_be_left_out_too():
    node = {"_target_": "timm.create_model", "model_name": "resnet18", "img_size": 32, "depth": 4}
    remedy = (
        "'~backbone.img_size' '~backbone.depth', or all of it: "  # never model_name, which fits
    )
    with pytest.raises(UserError, match=f"backbone: ResNet takes no 'img_size'.*: {remedy}"):
        build({"backbone": node})


def test_what_torchvision_does_not_take_can_be_left_out_too():
    node = {"_target_": "evaluation.adapters.torchvision_backbone", "patch_size": 8, "depth": 4}
    node |= {"model_name": "vit_b_16", "num_heads": 4}
    with pytest.raises(
        UserError, match=r"VisionTransformer takes no 'depth'.*: '~backbone.depth',"
    ):
        build({"backbone": node})


def test_what_it_does_not_name_is_refused_and_the_way_told(monkeypatch):
    monkeypatch.delenv("OCTIC_PACKAGES", raising=False)
    with pytest.raises(UserError, match="OCTIC_PACKAGES=my_nets in the environment"):
        resolve("my_nets.Mine")


def test_what_a_package_merely_imports_stays_refused(monkeypatch):
    monkeypatch.setenv("OCTIC_PACKAGES", "my_nets")
    with pytest.raises(UserError, match="it is defined in posixpath"):
        resolve("my_nets.join")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("no_such_nets", "no module 'no_such_nets'.*its folder belongs on PYTHONPATH"),
        ("./my_nets.py", "OCTIC_PACKAGES holds './my_nets.py'; it must be names such as"),
    ],
)
def test_a_package_that_is_not_there_is_one_line(monkeypatch, value, message):
    monkeypatch.setenv("OCTIC_PACKAGES", value)
    with pytest.raises(UserError, match=message):
        resolve("no_such_nets.Mine")


def test_what_fails_in_a_package_is_told_with_its_line(monkeypatch):
    monkeypatch.setenv("OCTIC_PACKAGES", "my_nets")
    with pytest.raises(UserError, match=r"KeyError: 'label' \(.*my_nets\.py:13\)"):
        build({"_target_": "my_nets.Failing"})


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import os\n{}['label']\n", "KeyError: 'label' (FILE:2)"),
        ("import os\nraise ValueError('two\\nlines')\n", "ValueError: two lines (FILE:2)"),
        ("import no_such_thing\n", "No module named 'no_such_thing' (FILE:1)"),
        ("from utils.errors import Nothing\n", "cannot import name 'Nothing'"),
        ("import os\nclass Mine(\n", "SyntaxError: '(' was never closed (FILE:2)"),
    ],
)
def test_a_package_that_fails_when_it_is_imported_is_one_line(monkeypatch, tmp_path, code, said):
    (tmp_path / "failing_nets.py").write_text(code)
    monkeypatch.setenv("OCTIC_PACKAGES", "failing_nets")
    with pytest.raises(UserError) as told:
        check_targets({"backbone": {"_target_": "failing_nets.Mine"}})
    line = str(told.value)
    assert line.startswith("backbone: failing_nets cannot be imported: ") and "\n" not in line
    assert said.replace("FILE", str(tmp_path / "failing_nets.py")) in line


@pytest.mark.parametrize("value", [True, 3, "x", None, [1], {"a": 1}])
def test_a_keyword_for_anything_takes_anything(monkeypatch, value):
    monkeypatch.setenv("OCTIC_PACKAGES", "my_nets")
    assert build({"_target_": "my_nets.Open", "of": value, "many": [value]}).of == value


@pytest.mark.parametrize(
    ("keywords", "said"),
    [
        ({"ends": [1, 2, 3]}, "ends must be a list of a number and a number or null, got .1, 2, 3"),
        ({"ends": [1, "b"]}, "ends must be a list of a number and a number or null"),
        ({"names": "abc"}, "names must be a list of text, got 'abc'"),
        ({"names": ["a", 1]}, "names must be a list of text"),
    ],
)
def test_a_list_of_another_kind_is_told_with_what_belongs_in_it(monkeypatch, keywords, said):
    monkeypatch.setenv("OCTIC_PACKAGES", "my_nets")
    right = {"_target_": "my_nets.Pair", "ends": [1, 2.5], "names": ["a", "b", "c"]}
    assert build(right).ends == [1, 2.5] and build({**right, "ends": None}).ends is None
    with pytest.raises(UserError, match=said):
        build({**right, **keywords})


def test_what_the_caller_adds_completes_the_node_and_replaces_unbuilt(monkeypatch):
    monkeypatch.setenv("OCTIC_PACKAGES", "my_nets")
    assert build({"_target_": "my_nets.Open", "of": 1}, many=[2]).of == 1
    failing = {"_target_": "my_nets.Failing"}
    assert build({"_target_": "my_nets.Mine", "width": failing}, width=3).width == 3


def test_the_hint_keeps_the_packages_that_are_set(monkeypatch):
    monkeypatch.setenv("OCTIC_PACKAGES", "my_nets another_one")
    with pytest.raises(UserError, match="OCTIC_PACKAGES=my_nets,another_one,third in the envir"):
        resolve("third.Mine")


def test_a_network_that_a_package_registers_with_timm_is_found(tmp_path, monkeypatch):
    (tmp_path / "my_registered.py").write_text(
        "from timm.models import build_model_with_cfg, register_model\n"
        "from timm.models.vision_transformer import VisionTransformer\n\n\n"
        "@register_model\n"
        "def vit_of_my_own(pretrained=False, **options):\n"
        "    made = {'embed_dim': 16, 'depth': 1, 'num_heads': 1, **options}\n"
        "    return build_model_with_cfg(VisionTransformer, 'vit_of_my_own', pretrained, **made)\n"
    )
    node = {"_target_": "vit.adapters.timm_backbone", "model_name": "vit_of_my_own"}
    monkeypatch.delenv("OCTIC_PACKAGES", raising=False)
    with pytest.raises(UserError, match="timm has no model 'vit_of_my_own'"):
        build(node)
    monkeypatch.setenv("OCTIC_PACKAGES", "my_nets,my_registered")
    assert build(node).embed_dim == 16
