"""Data sets in the layouts in which they are distributed, with few and small images, for tests."""

import io

import numpy as np
from pictures import rgb
from scipy.io import savemat

from configs.data import KINDS


def settings(kind, folder, num_classes, **values):
    """The settings of a task with train, test and the splits that `folders` names."""
    roles = {"train": "train", "held_out": "held_out", "test": "test", "shifts": ()}
    return KINDS[kind](kind=kind, folder=folder, num_classes=num_classes, **(roles | values))


def save_jpeg(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    rgb(12 + seed % 5, 10, seed).save(path)


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def cifar_images(n, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, 3, 32, 32), dtype=np.uint8)


def save_cifar10(root):
    """Five batches of 4 images of classes 0 and 1, a test batch, and CIFAR-10.1 in its own files."""
    folder = root / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    for i, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        labels = np.array([[0], [1], [1], [0]], dtype=np.uint8)
        table = np.hstack([labels, cifar_images(4, i).reshape(4, -1)])
        (folder / f"{name}.bin").write_bytes(table.tobytes())
    write(folder / "batches.meta.txt", "airplane\nautomobile\n\n")
    np.save(root / "cifar10.1_v6_data.npy", cifar_images(3, 9).transpose(0, 2, 3, 1))
    np.save(root / "cifar10.1_v6_labels.npy", np.array([1, 0, 1], dtype=np.int32))
    return settings("cifar10", root, 2, held_out_per_class=2, shifts=("new",), folders={"new": "cifar10.1_v6"})


def save_cifar100(root):
    """Each image has a coarse label, 7, before its fine one."""
    folder = root / "cifar-100-binary"
    folder.mkdir(parents=True)
    for i, name in enumerate(["train", "test"]):
        labels = np.array([[7, 1], [7, 0], [7, 1], [7, 0]], dtype=np.uint8)
        (folder / f"{name}.bin").write_bytes(np.hstack([labels, cifar_images(4, i).reshape(4, -1)]).tobytes())
    write(folder / "fine_label_names.txt", "apple\naquarium_fish\n")
    return settings("cifar100", root, 2, held_out_per_class=1)


def save_dtd(root):
    for i, split in enumerate(["train1", "val1", "test1", "train2"]):
        files = [f"{name}/{name}_{i}.jpg" for name in ("zig_zagged", "banded")]
        write(root / f"labels/{split}.txt", "".join(f"{file}\n" for file in files))
        for j, file in enumerate(files):
            save_jpeg(root / "images" / file, 2 * i + j)
    return settings("dtd", root, 2, folders={"train": "train1", "held_out": "val1", "test": "test1"})


def save_food101(root):
    write(root / "meta/classes.txt", "apple_pie\nbeef_tartare\n")
    write(root / "meta/labels.txt", "Apple pie\nBeef tartare\n")
    for split, numbers in (("train", (10, 11, 12)), ("test", (20,))):
        items = [f"{name}/{number}" for name in ("apple_pie", "beef_tartare") for number in numbers]
        write(root / f"meta/{split}.txt", "\n".join(items))
        for i, item in enumerate(items):
            save_jpeg(root / f"images/{item}.jpg", i + 100 * (split == "test"))
    return settings("food101", root, 2, held_out_per_class=1)


def save_sun397(root):
    classes = ["/a/abbey", "/a/apse/indoor", "/b/bus_depot/outdoor"]
    write(root / "SUN397/ClassName.txt", "\n".join(classes) + "\n")
    for split, numbers in (("Training_01", "abc"), ("Testing_01", "d")):
        files = [f"{name}/sun_{number}.jpg" for name in reversed(classes) for number in numbers]
        write(root / f"{split}.txt", "\n".join(files))
        for i, file in enumerate(files):
            save_jpeg(root / f"SUN397{file}", i + 100 * (split == "Testing_01"))
    return settings("sun397", root, 3, held_out_per_class=1, folders={"train": "Training_01", "test": "Testing_01"})


def save_cars(root):
    (root / "devkit").mkdir(parents=True)
    names = np.array(["AM General Hummer SUV 2000", "Acura RL Sedan 2012"], dtype=object)
    savemat(root / "devkit/cars_meta.mat", {"class_names": names})
    fields = [("bbox_x1", "O"), ("class", "O"), ("fname", "O")]
    for path, folder, labels in (
        ("devkit/cars_train_annos.mat", "cars_train", [2, 1, 2, 1]),
        ("cars_test_annos_withlabels.mat", "cars_test", [1]),
    ):
        rows = [(5, label, f"{i:05d}.jpg") for i, label in enumerate(labels, 1)]
        savemat(root / path, {"annotations": np.array([rows], dtype=fields)})
        for i, row in enumerate(rows):
            save_jpeg(root / folder / row[2], i + 100 * (folder == "cars_test"))
    return settings("cars", root, 2, held_out_per_class=1)


FMOW = """split,img_path,country_code,category,timestamp
train,a,JPN,zoo,2012-12-31T23:59:59Z
seq,b,JPN,zoo,2009-01-01T00:00:00Z
train,c,FRA,airport_hangar,2013-01-01T00:00:00Z
val,d,FRA,zoo,2010-05-05T10:00:00Z
val,e,FRA,zoo,2015-12-31T23:59:59Z
test,f,FRA,airport_hangar,2011-01-01T00:00:00Z
test,g,FRA,airport_hangar,2016-01-01T00:00:00Z
test,h,XKX,zoo,2017-01-01T00:00:00Z
test,i,JPN,zoo,2016-07-01T00:00:00.5Z
train,j,FRA,airport_hangar,2008-01-01T00:00:00Z
test,k,FRA,airport_hangar,2014-01-01T00:00:00Z
val,l,FRA,zoo,2016-02-01T00:00:00Z
"""
WILDS = {"folders": {"held_out": "id_val", "test": "id_test", "ood": "test"}, "shifts": ("ood",)}


def save_fmow(root):
    write(root / "rgb_metadata.csv", FMOW)
    write(root / "country_code_mapping.csv", "name,alpha-3,region\nJapan,JPN,Asia\nFrance,FRA,Europe\nIce,ATA,\n")
    (root / "images").mkdir()
    for i in range(12):
        rgb(10 + i, 10, i).save(root / f"images/rgb_img_{i}.png")
    return settings("fmow", root, 2, **WILDS)


def save_iwildcam(root):
    write(root / "categories.csv", "category_id,y,name\n0,0,empty\n2,99999,nobody\n7,1,tayassu pecari\n")
    rows = [("train", "a", 1), ("id_val", "b", 0), ("id_test", "c", 1), ("val", "d", 0), ("test", "e", 1)]
    rows += [("train", "f", 0), ("test", "g", 0)]
    table = "".join(f"{split},{i},{name}.jpg,{y}\n" for i, (split, name, y) in enumerate(rows))
    write(root / "metadata.csv", "split,location,filename,y\n" + table)
    for i, row in enumerate(rows):
        save_jpeg(root / f"train/{row[1]}.jpg", i)
    return settings("iwildcam", root, 2, **WILDS)


def encoded(seed):
    buffer = io.BytesIO()
    rgb(12, 10, seed).save(buffer, "JPEG")
    return buffer.getvalue()


def save_parquet(root):
    """Parquet files with the schema that `datasets` itself writes; needs a cache of its own, see the tests."""
    import datasets

    features = datasets.Features({"img": datasets.Image(), "fine": datasets.ClassLabel(names=["red_fox", "hare"])})
    for split, labels in (("train", [0, 1, 1, 0]), ("validation", [1])):
        first = 100 * (split == "validation")
        images = [{"bytes": encoded(first + i), "path": None} for i in range(len(labels))]
        table = datasets.Dataset.from_dict({"img": images, "fine": labels}, features=features)
        (root / "data").mkdir(parents=True, exist_ok=True)
        table.to_parquet(root / f"data/{split}-00000-of-00001.parquet")
    return settings("parquet", root, 2, label="fine", held_out_per_class=1, folders={"test": "validation"})
