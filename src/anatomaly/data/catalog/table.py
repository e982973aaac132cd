"""The data sets of the two papers: what a person should know of each, and how its download is read.

docs/datasets.md says the same at more length.  What was not verified when this was written is marked so.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from anatomaly.data.catalog import layouts as originals
from anatomaly.data.catalog.download import Layout

_OWN_SPLIT = (
    "Ours, the paper's list is not known: a fifth of the normal {unit}, rounded up, drawn by a digest of the {key}, "
    "and every anomalous image are tested; the other normal images train."
)
_OWNERS_SPLIT = (
    "The owner's folders; anomalous training images are left out, and so is a training or validation image whose "
    "patient is tested."
)


@dataclass(frozen=True, slots=True)
class DataSet:
    """One public data set: what a person should know before using it, and how its download is read.

    Attributes:
        name: Name in the papers and on the command line; the task of its rows is the name in lower case.
        what: Images and finding.
        papers: "PDD", "D2-4FAD".
        owner: Who publishes it.
        address: Where.
        licence: As far as known.
        images: How many the original has.
        count: The same as a number, to be compared with a download; None where it is not known or differs by release.
        layout: What the folder looks like.
        labels: Which images are normal.
        split: How train, val and test come about.
        caution: What to know before believing a score.
        layouts: How the folder is recognised and read.
        most_tested: Patients of each label that are tested at most, one image each; None tests all.
    """

    name: str
    what: str
    papers: tuple[str, ...]
    owner: str
    address: str
    licence: str
    images: str
    count: int | None
    layout: str
    labels: str
    split: str
    caution: str
    layouts: tuple[Layout, ...]
    most_tested: int | None = None


#: In the order of the papers.
CATALOG = (
    DataSet(
        name="HeadCT",
        what="head CT slices, haemorrhage",
        papers=("PDD",),
        owner="Felipe Kitamura, Kaggle 2018",
        address="https://www.kaggle.com/datasets/felipekitamura/head-ct-hemorrhage",
        licence="not verified",
        images="200 PNG: 100 normal, 100 haemorrhage",
        count=200,
        layout="labels.csv (id, hemorrhage) beside head_ct/[head_ct/]000.png ... 199.png",
        labels="hemorrhage 0 normal, 1 anomalous",
        split=_OWN_SPLIT.format(unit="images", key="id"),
        caution=(
            "Patients unknown; near-duplicates exist and can cross the split (data check shows them). The mean gray "
            "alone reached an AUROC of 0.79 on an extract. 20 normal test images: an AUROC of 0.90 means 0.82 to 0.96."
        ),
        layouts=(
            Layout(
                ("labels.csv", "head_ct"),
                partial(
                    originals.read_table,
                    task="headct",
                    table="labels.csv",
                    columns=("id", "hemorrhage"),
                    labels={"0": 0, "1": 1},
                    folder="head_ct",
                    file="{:0>3}.png",
                ),
            ),
        ),
    ),
    DataSet(
        name="BrainMRI",
        what="brain MRI slices, tumour",
        papers=("PDD",),
        owner="Navoneel Chakrabarty, Kaggle 2019",
        address="https://www.kaggle.com/datasets/navoneel/brain-mri-images-for-brain-tumor-detection",
        licence="not verified",
        images="253 JPEG and PNG: 98 no, 155 yes",
        count=253,
        layout="yes/ and no/; the archive holds both a second time in brain_tumor_dataset/, which is not read",
        labels="no normal, yes anomalous",
        split=_OWN_SPLIT.format(unit="images", key="file name"),
        caution="Patients unknown, sources mixed; near-duplicates can cross the split.",
        layouts=(
            Layout(("yes", "no"), partial(originals.read_class_folders, task="brainmri", classes={"no": 0, "yes": 1})),
        ),
    ),
    DataSet(
        name="ZhangLab",
        what="chest X-rays of children, pneumonia",
        papers=("PDD",),
        owner="Kermany, Zhang, Goldbaum, Mendeley Data 2018",
        address="https://data.mendeley.com/datasets/rscbjbr9sj",
        licence="CC BY 4.0",
        images="5,856 JPEG; the Kaggle copy as 5,216 train, 16 val, 624 test (234 normal, 390 pneumonia)",
        count=5856,
        layout="chest_xray/{train,[val,]test}/{NORMAL,PNEUMONIA}, also twice nested with __MACOSX beside it",
        labels="NORMAL normal, PNEUMONIA anomalous",
        split=_OWNERS_SPLIT + " Its 624 test images are the usual test set.",
        caution=(
            "File bytes per pixel alone reached an AUROC of 0.82 on an extract. Patients are read from the file names; "
            "whether a person number means the same child in two folders is not stated, here it does."
        ),
        layouts=(
            Layout(
                ("train/normal", "test/normal", "test/pneumonia"),
                partial(
                    originals.read_class_folders,
                    task="zhanglab",
                    classes={"NORMAL": 0, "PNEUMONIA": 1},
                    splits={"train": "train", "val": "val", "test": "test"},
                    patient_of=originals.zhanglab_patient,
                ),
            ),
        ),
    ),
    DataSet(
        name="CheXpert",
        what="chest X-rays of adults, 14 observations",
        papers=("PDD",),
        owner="Stanford Machine Learning Group 2019",
        address="https://stanfordmlgroup.github.io/competitions/chexpert/",
        licence="research use agreement of Stanford, after registration (text not verified)",
        images="224,316 of 65,240 patients; train.csv of the small version lists 223,414",
        count=None,
        layout="CheXpert-v1.0[-small]/ with train.csv, valid.csv, train/patientNNNNN/studyN/viewN_frontal.jpg, valid/",
        labels=(
            "frontal views; normal: No Finding 1 and no finding 1 or -1; anomalous: a finding 1 (Support Devices is "
            "none); uncertain and unmentioned ones are left out"
        ),
        split=(
            "Ours, the paper's list is not known: from train.csv 250 patients without any anomalous image (at most a "
            "fifth of them) and 250 with one, drawn by a digest of the patient, are tested with one image each; other "
            "normal images train; valid.csv (radiologists' labels) is val. A tested patient is nowhere else."
        ),
        caution="Labels of train.csv were mined from reports. Devices are visible in normal images too.",
        layouts=(Layout(("train.csv", "valid.csv", "train"), partial(originals.read_chexpert, task="chexpert")),),
        most_tested=250,
    ),
    DataSet(
        name="Uni-Medical",
        what="brain MRI, liver CT, retina OCT slices with lesion masks: three tasks",
        papers=("PDD",),
        owner="ADer (Zhang et al.), from BMAD (Bao et al. 2024): BraTS2021, BTCV + LiTS, RESC",
        address="https://github.com/zhangzjn/ADer/blob/main/data/README.md",
        licence="of the sources; BMAD is given as CC BY-NC-SA (not verified)",
        images="train 7,500 brain, 1,542 liver, 4,297 retina (as a copy of BMAD states); test not verified",
        count=None,
        layout="meta.json beside brain/, liver/, retinal/; or BMAD's Brain, Liver and RESC with train/good[/img], "
        "{valid,test}/{good,Ungood}/{img,label}",
        labels="anomaly 0 normal, 1 anomalous; in BMAD good normal, Ungood anomalous",
        split=_OWNERS_SPLIT,
        caution=(
            "Slices, not patients: neighbouring slices look alike. The case is read from the names of brain slices "
            "(00003_60: our reading, not stated); liver and retina give none."
        ),
        layouts=(
            Layout(
                ("meta.json",),
                partial(
                    originals.read_meta,
                    tasks=("brain", "liver", "retinal", "retina"),
                    patients={"brain": originals.brats_case},
                ),
            ),
            *(
                Layout(
                    tuple(f"{folder}/train/good" for folder in folders),
                    partial(
                        originals.read_bmad_folders,
                        folders=dict(zip(folders, ("brain", "liver", "retinal"), strict=True)),
                        patients={"brain": originals.brats_case},
                    ),
                )
                for folders in (
                    ("Brain", "Liver", "RESC"),
                    ("Brain", "Liver", "Retina_RESC"),
                    ("Brain_AD", "Liver_AD", "Retina_RESC_AD"),
                )
            ),
        ),
    ),
    DataSet(
        name="HIS",
        what="patches of lymph node sections (Camelyon16), metastasis",
        papers=("D2-4FAD",),
        owner="BMAD (Bao et al. 2024), from the Camelyon16 challenge",
        address="https://github.com/DorisBao/BMAD",
        licence="BMAD is given as CC BY-NC-SA (not verified); Camelyon16 not verified",
        images="train 5,088 (as a copy of BMAD states); valid and test not verified",
        count=None,
        layout="camelyon16/{train/good,[valid,]test/{good,Ungood}}/NAME.png, BMAD's; MedIAnomaly's has no valid",
        labels="good normal, Ungood anomalous",
        split=_OWNERS_SPLIT + " D2-4FAD's selection is not known.",
        caution=(
            "BMAD numbers its patches, so their slides are unknown; a name such as tumor_009_x_y gives the slide. "
            "BMAD's Chest and OCT2017 have the same folders: name the right one."
        ),
        layouts=(
            Layout(
                ("train/good", "test/good", "test/Ungood"),
                partial(originals.read_bmad_folders, folders={".": "his"}, patients={"his": originals.camelyon_slide}),
            ),
        ),
    ),
    DataSet(
        name="LAG",
        what="colour fundus photographs, glaucoma",
        papers=("D2-4FAD",),
        owner="Li et al. 2019 (password on request)",
        address="https://github.com/smilell/AG-CNN",
        licence="academic purposes only, no re-upload (the owner's words)",
        images="11,760 (6,882 normal, 4,878 glaucoma), 5,824 of them (3,432, 2,392) with attention maps",
        count=None,
        layout="{non_glaucoma,suspicious_glaucoma}/image/NAME.jpg; attention_map/ and label/ beside it are not read",
        labels="non_glaucoma normal, suspicious_glaucoma anomalous",
        split=_OWN_SPLIT.format(unit="images", key="file name"),
        caution="Patients unknown; two eyes of one person may be in two splits. Only a first part of it is handed out.",
        layouts=(
            Layout(
                ("non_glaucoma", "suspicious_glaucoma"),
                partial(
                    originals.read_class_folders, task="lag", classes={"non_glaucoma": 0, "suspicious_glaucoma": 1}
                ),
            ),
        ),
    ),
    DataSet(
        name="APTOS",
        what="colour fundus photographs, diabetic retinopathy",
        papers=("D2-4FAD",),
        owner="Asia Pacific Tele-Ophthalmology Society, Kaggle 2019",
        address="https://www.kaggle.com/competitions/aptos2019-blindness-detection",
        licence="competition rules of Kaggle (not verified)",
        images="3,662 labelled (train.csv); test.csv is unlabelled and not read",
        count=3662,
        layout="train.csv (id_code, diagnosis) beside train_images/ID.png",
        labels="diagnosis 0 normal, 1 to 4 anomalous",
        split=_OWN_SPLIT.format(unit="images", key="id_code"),
        caution=(
            "Patients unknown. Repeated photographs, and a size and crop that go with the grade, are known from the "
            "competition (not verified here): compare with the image size before believing a high AUROC."
        ),
        layouts=(
            Layout(
                ("train.csv", "train_images"),
                partial(
                    originals.read_table,
                    task="aptos",
                    table="train.csv",
                    columns=("id_code", "diagnosis"),
                    labels={"0": 0, "1": 1, "2": 1, "3": 1, "4": 1},
                    folder="train_images",
                    file="{}.png",
                ),
            ),
        ),
    ),
    DataSet(
        name="RSNA",
        what="chest X-rays, lung opacity and other findings",
        papers=("D2-4FAD",),
        owner="Radiological Society of North America, Kaggle 2018, from NIH ChestX-ray14",
        address="https://www.kaggle.com/competitions/rsna-pneumonia-detection-challenge",
        licence="competition rules and RSNA's terms, non-commercial (not verified)",
        images="26,684 labelled DICOM: 8,851 Normal, 11,821 No Lung Opacity / Not Normal, 6,012 Lung Opacity",
        count=26684,
        layout="stage_2_detailed_class_info.csv (patientId, class), [stage_2_train_labels.csv], "
        "stage_2_train_images/PATIENTID.dcm",
        labels="class Normal normal, the other two anomalous; Target 0 alone does not mean normal",
        split=_OWN_SPLIT.format(unit="patients", key="patientId"),
        caution=(
            "One image per patientId, but one NIH patient may have several; the tables do not tell. Many papers "
            "leave out Not Normal: figures differ."
        ),
        layouts=(
            Layout(
                ("stage_2_detailed_class_info.csv", "stage_2_train_images"), partial(originals.read_rsna, task="rsna")
            ),
        ),
    ),
    DataSet(
        name="BrainTumor",
        what="brain MRI slices, glioma, meningioma, pituitary tumour",
        papers=("D2-4FAD",),
        owner="Masoud Nickparvar, Kaggle 2021, merged from figshare, SARTAJ and Br35H",
        address="https://www.kaggle.com/datasets/masoudnickparvar/brain-tumor-mri-dataset",
        licence="CC0 as a third party states (not verified; the sources' own not verified)",
        images="7,023 JPEG (later versions may differ)",
        count=7023,
        layout="{Training,Testing}/{glioma,meningioma,notumor,pituitary}/NAME.jpg",
        labels="notumor normal, the others anomalous",
        split=_OWNERS_SPLIT + " D2-4FAD's selection is not known.",
        caution=(
            "Patients unknown; near-duplicates cross Training and Testing. Normal and tumour images come from "
            "different collections: the mean gray alone reached an AUROC of 0.74 on an extract."
        ),
        layouts=(
            Layout(
                ("Training/notumor", "Testing/notumor"),
                partial(
                    originals.read_class_folders,
                    task="braintumor",
                    classes={"notumor": 0, "glioma": 1, "meningioma": 1, "pituitary": 1},
                    splits={"Training": "train", "Testing": "test"},
                ),
            ),
        ),
    ),
)
