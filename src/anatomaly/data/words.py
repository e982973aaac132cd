"""What a label word means: normal, anomalous, or unclear, in every spelling.

Case, blanks, underscores, hyphens, joined words (`NoFinding`, `notumor`) and plurals do not matter.  Public tables and
folders name what is healthy in many ways; calling it anomalous would go unnoticed, so a word that may mean either is
refused.  Whatever is no such word is the name of a finding: `glioma`, `Ungood`, MVTec's `cut_lead`.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import product
from typing import Literal

from anatomaly.errors import ManifestError

_LISTED = 8  # unclear words a message names


def _tokens(word: str) -> list[str]:
    """The parts of a word in lower case and the singular: `NoFindings`, `no_finding` -> no, finding."""
    text = unicodedata.normalize("NFKC", word)
    text = re.sub(r"(?<=[^\W\d_])(?=\d)|(?<=\d)(?=[^\W\d_])|(?<=[^\W\d_A-Z])(?=[A-Z])", " ", text)
    return [_singular(token) for token in re.split(r"[\W_]+", text.casefold()) if token]


def _singular(token: str) -> str:
    if token.endswith("ies") and len(token) > 4:
        return token[:-3] + "y"
    if token.endswith("sses"):
        return token[:-2]
    return token[:-1] if len(token) > 3 and token.endswith("s") and not token.endswith(("ss", "us", "is")) else token


def _joined(*words: str) -> frozenset[str]:
    return frozenset("".join(_tokens(word)) for line in words for word in line.split(", "))


_PEOPLE = _joined("control, subject, patient, person, people, individual, volunteer, donor, case, participant")
_PLACES = _joined(
    "brain, head, chest, lung, heart, liver, kidney, spleen, breast, eye, fundus, retina, oct, skin, bone, spine",
    "knee, cecum, pylorus, z_line, colon, stomach, esophagus, oesophagus, mucosa, tissue, prostate, thyroid",
    "pancreas, scan, image, slice, study, exam, x_ray, xray, cxr, ct, mr, mri, us, ultrasound, anatomy",
    "appearance, limits, range, vessel",
)

#: What `no ...`, `non ...`, `without ...` or `... free` must deny to mean normal: findings as such, and those that are
#: the one question of well-known sets.  Not so covid or opacity: a lung without them is often ill otherwise.
_FINDINGS = _joined(
    "finding, significant_finding, relevant_finding, pathological_finding, abnormal_finding, acute_finding",
    "abnormality, abnormal, significant_abnormality, acute_abnormality, acute_cardiopulmonary_abnormality",
    "anomaly, anomalous, pathology, pathological, pathologic, disease, diseased, acute_disease, lesion, defect",
    "defective, illness, disorder, injury, disease_detected, disease_found, abnormality_detected",
    "abnormality_found, tumor, tumour, brain_tumor, brain_tumour, dr, retinopathy, diabetic_retinopathy",
    "apparent_dr, apparent_retinopathy, apparent_diabetic_retinopathy, glaucoma, infected, affected, sick, ill",
    "hemorrhage, haemorrhage, intracranial_hemorrhage, intracranial_haemorrhage, bleed, bleeding, ich, stroke",
    "fracture, fractured, polyp, dementia, demented, alzheimer, tuberculosis, tb, pneumonia",
)

_WITHOUT = ("no", "non", "without", "absenceof", "freeof", "noevidenceof", "nosignof")
_NORMAL = (
    _joined(
        "good, ok, okay, normal, healthy, normality, normalcy, unremarkable, unaffected, uninfected, undiseased",
        "within_normal_limits, wnl, nad, cognitively_normal, normal_cognition, normal_variant",
        "sans_particularite, normale, normaux, normaal, normalbefund, gesund, unauffällig, befundlos",
        "ohne_befund, sano, sana, sain, saudavel, норма, здоровый, 正常, 健康, not_affected, not_diseased",
        "not_infected, not_sick, not_ill, nothing_abnormal, nothing_abnormal_detected, not_demented",
        "negative_for_disease",
    )
    | {a + b for a, b in product(("normal", "healthy"), _PEOPLE)}
    | {a + b for a, b in product(("normal", "healthy"), _PLACES)}
    | {b + a for a, b in product(("normal", "healthy"), _PLACES)}
    | {a + b for a, b in product(_WITHOUT, _FINDINGS)}
    | {b + "free" for b in _FINDINGS}
)

#: Names of findings that would be taken for normal or unclear by a part of them.
_ANOMALOUS = _joined(
    "not_good, not_ok, nok, not_normal, not_healthy, no_good, abnormal, anomalous, ungood, bad, defect",
    "defective, normal_pressure_hydrocephalus, normal_tension_glaucoma, no_lung_opacity_not_normal",
)

#: Words that may mean either, or that say nothing about the image.
_UNCLEAR = _joined(
    "control, case_control, patient_control, benign, negative, neg, positive, pos, no, yes, n, y, p, t, f, false",
    "true, none, null, nil, na, n/a, nan, not_available, not_applicable, not_given, not_labeled, not_labelled",
    "unknown, unk, unlabeled, unlabelled, unclassified, unannotated, unspecified, undefined, undetermined",
    "indeterminate, uncertain, unsure, unclear, inconclusive, equivocal, borderline, questionable, suspicious",
    "suspected, possible, probable, maybe, tbd, todo, pending, ungraded, ungradable, label, class, all, mixed",
    "both, data, dataset, raw, image, img, picture, photo, scan, slice, dicom, dcm, nifti, png, jpg, jpeg, hc",
    "nc, cn, hv, hs, asymptomatic, absent, absence, free, clear, clean, intact, standard, reference, baseline",
    "nonmass, noncovid, nocovid, without, non, not, near_normal, almost_normal, mostly_normal, probably_normal",
)
_UNCLEAR_IN_TABLES = _joined(
    "missing, empty, blank, other, misc, miscellaneous"
)  # in a folder layout these are defects

_NUMBERED = _joined(
    "class, category, group, patient, subject, sub, case, study, series, scan, fold, part, batch, label, birads"
)
_GRADED = _joined("grade, stage, score, level, kl, severity")
_DENIALS = frozenset({"no", "not", "without", "absenceof", "absence", "ohne", "kein", "keine", "sans", "sin"})


def label_of(word: str, where: str, *, folder: bool = False) -> Literal[0, 1]:
    """Turn a folder name or the word of a label column into 0 (normal) or 1 (anomalous).

    Args:
        word: Not empty; spelling does not matter.
        where: Start of the error message, such as "cases.csv: row 7".
        folder: The word names a class folder, where `missing` or `other` is the name of a defect.

    Returns:
        0 or 1.

    Raises:
        ManifestError: A word that could mean either, or a number other than 0 and 1.

    Example:
        >>> label_of("No Finding", "row 2"), label_of("glioma", "row 3")
        (0, 1)
    """
    label = meaning_of(word, folder=folder)
    if label is None:
        raise unclear_labels({word.strip(): ""}, where, folder=folder)
    return label


def unclear_labels(places: Mapping[str, str], source: str, *, folder: bool) -> ManifestError:
    """The one line that refuses words that may mean either: it lists them and says how to say it.

    Args:
        places: Unclear word -> where it stands first, empty where `source` says it.
        source: Start of the message.
        folder: The words name class folders.
    """
    words = [f"{word!r} ({place})" if place else repr(word) for word, place in places.items()]
    more = f" and {len(words) - _LISTED} more" if len(words) > _LISTED else ""
    named = ", ".join(words[:_LISTED]) + more
    advice = (
        "Rename the folder to good or to the name of the finding, or write a manifest.csv with label 0 or 1."
        if folder
        else "Write 0 (normal) or 1 (anomalous) instead, or leave the cell empty where it is not known."
    )
    return ManifestError(f"{source}: label{'s' * (len(words) > 1)} {named} could mean normal or anomalous. {advice}")


@lru_cache(maxsize=4096)
def meaning_of(word: str, *, folder: bool = False) -> Literal[0, 1] | None:
    """0 normal, 1 anomalous, None where a word may mean either; see `label_of`."""
    try:
        number = float(word.strip().replace(",", "."))  # tables written by pandas hold 0.0 and 1.0, Excel 0,0
    except ValueError:
        return _meaning(_tokens(word), folder)
    return 0 if number == 0 else 1 if number == 1 else None


def is_anomalous(word: str) -> bool:
    """Whether a word says outright that images are anomalous, such as `abnormal`; the name of a finding does not."""
    return "".join(token for token in _tokens(word) if not token.isdecimal()) in _ANOMALOUS


def _meaning(tokens: Sequence[str], folder: bool) -> Literal[0, 1] | None:
    numbers = [token for token in tokens if token.isdecimal()]
    words = [token for token in tokens if not token.isdecimal()]  # 0_No_DR, Normal (1), normal2
    name = "".join(words)
    if name in _ANOMALOUS:
        return 1
    if not name or name in _UNCLEAR or (not folder and name in _UNCLEAR_IN_TABLES):
        return None
    if name in _NORMAL:
        return 0
    return None if _is_doubtful(words, numbers) else 1


def _is_doubtful(words: Sequence[str], numbers: Sequence[str]) -> bool:
    """Whether a name that stands in no list may be one for normal: it denies something, or a part of it says normal."""
    name = "".join(words)
    if name in _NUMBERED or (name in _GRADED and not any(map(int, numbers))):
        return True
    if words[0] in _DENIALS or (len(words) == 2 and not {"non", "negative", "control"}.isdisjoint(words)):
        return True
    return not {"normal", "healthy", "good", "unremarkable"}.isdisjoint(words)
