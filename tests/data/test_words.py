import pytest

from anatomaly.data.words import label_of, meaning_of
from anatomaly.errors import ManifestError

NORMAL = """\
No Finding;no tumor;No DR;normals;healthy control;no_tumor;notumor;NoTumor;NOTUMOR;NORMAL;Normal ;good;OK
healthy;Healthy_Controls;HEALTHY CONTROLS;No-Findings;no finding;nofindings;No  Finding;no__finding;0;0.0
0,0;0_No_DR;No_DR (0);normal2;NonDemented;Non Demented;non-diseased;tumor-free;tumour free;unremarkable
WNL;cognitively normal;no lesions;No abnormality detected;without findings;within normal limits
Normal Brain;brain_normal;normal-cecum;正常;normale;no haemorrhage;Uninfected;No Apparent Retinopathy
no disease;not diseased;normal subjects;NormalControl;Healthy Patients"""
UNCLEAR = """\
unknown;Unknown;UNLABELED;unlabelled;n/a;N/A;nan;None;null;negative;Negatives;positive;benign;control
controls;no;yes;FALSE;true;2;0.5;-1;?;-;no opacity;no lung opacity;no effusion;non-covid;No covid
nonCOVID;COVID negative;class 1;patient01;sub-03;Patient_7;img;images;data;N;hc;normal to mild
near normal;grade 0;stage 0;not available;TBD;no_label;non mass;BI-RADS 2;missing;other;infinity;１２"""
ANOMALOUS = """\
Ungood;abnormal;1;1.0;1,0;glioma;bad;PNEUMONIA;Cardiomegaly;cut_lead;broken_large;tumor
Atelectasis|Effusion;non-small cell lung cancer;normal pressure hydrocephalus;Normal-tension glaucoma
No Lung Opacity / Not Normal;not normal;unhealthy;nodule;nodules;notch;abnormality;grade 3;stage 2
triple negative breast cancer;benign tumor;nok;diseased;anomalies;combined;hole;missing_cable
logical_anomalies;Pneumonia, no effusion;sick;Proliferate_DR;VeryMildDemented;CNV"""


def words(text):
    return [word for line in text.splitlines() for word in line.split(";")]


@pytest.mark.parametrize("word", words(NORMAL))
def test_words_for_normal_in_every_spelling(word):
    assert meaning_of(word) == meaning_of(word, folder=True) == 0


@pytest.mark.parametrize("word", words(UNCLEAR))
def test_words_that_may_mean_either_are_never_taken_for_a_finding(word):
    assert meaning_of(word) is None


@pytest.mark.parametrize("word", words(ANOMALOUS))
def test_findings_and_words_for_anomalous(word):
    assert meaning_of(word) == meaning_of(word, folder=True) == 1


def test_in_a_folder_layout_missing_and_other_are_names_of_defects():
    assert [meaning_of(word, folder=True) for word in ("missing", "Others", "unknown", "images")] == [1, 1, None, None]


@pytest.mark.parametrize(("folder", "advice"), [(False, "Write 0 (normal) or 1"), (True, "Rename the folder to good")])
def test_an_unclear_word_is_refused_with_what_to_do(folder, advice):
    with pytest.raises(ManifestError) as caught:
        label_of(" Negative ", "here", folder=folder)
    assert str(caught.value).startswith("here: label 'Negative' could mean normal or anomalous. " + advice)
