"""Figures stand in tables that a person can read, whatever their shape."""

from evaluation.report.figures import Table, tables


def test_heads_are_a_table_of_their_own() -> None:
    heads = {"lr_0_1": {"val top-1": 50.0, "val top-5": 90.0}, "lr_1": {"val top-1": 40.0}}
    figures = {"linear_top1": 50.0, "linear_top5": 90.0, "heads": heads}
    figures["selection"] = [{"C": 1, "top1": 36.5}, {"C": 10, "top1": 48.0}]
    first, *inner = tables("linear", figures)
    assert first == Table("", ["top1", "top5"], [("linear", [50.0, 90.0])])
    rows = [("lr_0_1", [50.0, 90.0]), ("lr_1", [40.0, None])]
    assert inner[0] == Table("heads", ["val top-1", "val top-5"], rows)
    assert inner[1] == Table("selection", ["C", "top1"], [("1", [1, 36.5]), ("2", [10, 48.0])])


def test_rows_of_knn_have_the_names_that_a_training_prints() -> None:
    figures = {
        f"('{group}', {k}) Top {top}": float(k + top)
        for group, k in (("full", 10), ("5 per class", 20))
        for top in (1, 5)
    }
    (table,) = tables("knn", figures)
    rows = [("knn10", [11.0, 15.0]), ("knn20_5_per_class", [21.0, 25.0])]
    assert table == Table("", ["Top 1", "Top 5"], rows)


def test_errors_by_layer_are_a_table_of_each_net() -> None:
    """As the equivariance report writes them; what no net has is left out."""
    layers = {"patch_embed": {"e": 0.0, "r": 1e-7}, "blocks.0": {"e": 0.0, "r": None}}
    net = {"largest error": 1e-7, "layers": layers, "same class": {}}
    found = tables("equivariance", {"octic": net, "plain": net | {"same class": {"e": 1.0}}})
    assert [table.title for table in found] == ["", "octic: layers", "plain: layers", "same class"]
    assert found[0].rows == [("octic", [1e-7]), ("plain", [1e-7])]
    assert found[1].columns == ["e", "r"]
    assert found[1].rows == [("patch_embed", [0.0, 1e-7]), ("blocks.0", [0.0, None])]
    assert tables("equivariance", {"octic": net})[1].title == "layers"


def test_classes_go_down_the_page_and_so_do_many_nets() -> None:
    iou = {f"class {index}": float(index) for index in range(20)}
    found = tables(
        "segmentation", {"knn": {"miou": 5.0, "class_iou": iou}, "logreg": {"miou": 6.0}}
    )
    assert found[0].rows == [("knn", [5.0]), ("logreg", [6.0])]
    assert found[1].title == "class_iou" and len(found[1].rows) == 20
    nets = {f"net {index}": {"mean_of_eight": 1.0, "cost": 2} for index in range(13)}
    (table,) = tables("symmetry", nets)
    assert table.columns == ["mean of eight", "cost"] and len(table.rows) == 13
