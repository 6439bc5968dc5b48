"""The tables of the paper as plain data, with the figures that it prints as text.

`extras/tables.py` makes the runs behind them. A row is a dict: `method`, `arm`, share of `labels`,
the `paper`'s figure or "", `options` that differ from the set-up of a size, and `name`, which says
how. START is the size's start; `epochs` a multiple of its epochs, so that 50 to 300 keep theirs.
"""

# %% sizes and networks

R50, VIT = "resnet50.a1_in1k", "vit_base_patch16_384.augreg_in21k_ft_in1k"
R18, R200, DENSENET = "resnet18.a1_in1k", "resnet200", "densenet161.tv_in1k"
VIT_L, DEIT = "vit_large_patch16_384.augreg_in21k_ft_in1k", "deit_base_patch16_384.fb_in1k"
SWIN = "swin_base_patch4_window12_384.ms_in22k_ft_in1k"
ARMS = {"cnn": R50, "transformer": VIT}
SMALL = {  # the network that stands in for each of the paper's at --size small
    R50: "test_resnet", R18: "resnet10t", R200: "resnet14t", DENSENET: "test_efficientnet",
    VIT: "test_vit", VIT_L: "test_vit2", DEIT: "test_vit3", SWIN: "test_vit4"}
SMALL_TIMED = {"cnn": "resnet18", "transformer": "vit_tiny_patch16_224"}  # T1 at --size small
SIZES = {  # small: what 2 CPU cores carry; DINO's 65,336 outputs would outweigh such networks
    "paper": {"image_size": 384, "init": "imagenet", "epochs": 100, "tuning": 50,
              "out_dim": 65336},
    "small": {"image_size": 96, "init": "random", "epochs": 20, "tuning": 50, "out_dim": 1024}}

# %% short ways to write rows


def compare(shares: tuple, figures: str) -> list[dict]:
    """Rows from lines of method, arm, and a figure for each of the `shares` of labels. CASS has
    more: the arm chosen on validation, both arms together, and all with --loss contrast."""
    rows = []
    for line in figures.strip().splitlines():
        method, arm, *papers = line.split()
        row = {"method": method, "name": method, "options": {}}
        for labels, paper in zip(shares, papers):
            rows.append(row | {"arm": arm, "labels": labels, "paper": paper})
    for labels in shares:
        for arm in ("chosen", "ensemble"):
            rows.append({"method": "CASS", "name": "CASS", "options": {}, "arm": arm,
                         "labels": labels, "paper": ""})
    contrast = {"paper": "", "name": "contrast", "options": {"loss": "contrast"}}
    return rows + [row | contrast for row in rows if row["method"] == "CASS"]


def ablate(*figures: tuple, method: str = "CASS") -> list[dict]:
    """Rows from (name, options, the CNN's figure, and the Transformer's if there is one)."""
    rows = []
    for name, options, papers in figures:
        row = {"method": method, "labels": 1, "name": name, "options": options}
        for arm, paper in zip(ARMS, papers.split()):
            rows.append(row | {"arm": arm, "paper": paper})
    return rows


# %% the tables: mean±spread as printed; what is not named is the paper's set-up

AUTO, BRAIN, ISIC = "autoimmune", "brain MRI", "ISIC 2019"
BASE_AUTO = "0.8650±0.0001 0.8894±0.005"
BASE_BRAIN = "0.9909±0.0032 0.9279±0.0213"
FROM_RANDOM = {"cnn": R200, "init": "random,START"}  # timm has no weights for the first arm
TIMES = ("The paper, on an RTX 8000, both arms, CASS / DINO: autoimmune 21 min / 1 h 13; Dermofit "
         "1 h 11 / 3 h 9; brain MRI 7 h 11 / 26 h 21; ISIC 2019 29 h 58 / 109 h 21.")
TABLES = {
    "T1": {"title": "Time of CASS against DINO", "data": "any", "rows": []},
    "T2": {"title": "Autoimmune biopsies", "data": AUTO, "rows": compare((0.1, 1), """
        DINO        cnn          0.8237±0.001     0.84252±0.008
        CASS        cnn          0.8158±0.0055    0.8650±0.0001
        supervised  cnn          0.819±0.0216     0.83895±0.007
        DINO        transformer  0.8445±0.0008    0.8639±0.002
        CASS        transformer  0.8717±0.005     0.8894±0.005
        supervised  transformer  0.8356±0.007     0.8420±0.009""")},
    "T3": {"title": "Dermofit", "data": "Dermofit", "rows": compare((0.1, 1), """
        DINO        cnn          0.3749±0.0011    0.6775±0.0005
        CASS        cnn          0.4367±0.0002    0.7132±0.0003
        supervised  cnn          0.33±0.0001      0.6341±0.0077
        DINO        transformer  0.332±0.0002     0.4810±0.0012
        CASS        transformer  0.3896±0.0013    0.6667±0.0002
        supervised  transformer  0.299±0.002      0.456±0.0077""")},
    "T4": {"title": "Brain tumour MRI", "data": BRAIN, "rows": compare((0.01, 0.1, 1), """
        DINO        cnn          0.63405±0.09     0.92325±0.02819  0.9900±0.0058
        CASS        cnn          0.40816±0.13     0.8925±0.0254    0.9909±0.0032
        supervised  cnn          0.52±0.018       0.9022±0.011     0.9899±0.003
        DINO        transformer  0.3211±0.071     0.7529±0.044     0.8841±0.0052
        CASS        transformer  0.3345±0.11      0.7833±0.0259    0.9279±0.0213
        supervised  transformer  0.3017±0.077     0.747±0.0245     0.8719±0.017""")},
    "T5": {"title": "ISIC 2019", "data": ISIC, "rows": compare((0.01, 0.1, 1), """
        DINO        cnn          0.328±0.0016     0.3797±0.0027    0.493±3.9e-05
        CASS        cnn          0.3617±0.0047    0.41±0.0019      0.543±2.85e-05
        supervised  cnn          0.2640±0.031     0.3070±0.0121    0.35±0.006
        DINO        transformer  0.3676±0.012     0.3998±0.056     0.5408±0.001
        CASS        transformer  0.3973±0.0465    0.4395±0.0179    0.5819±0.0015
        supervised  transformer  0.3074±0.0005    0.3586±0.0314    0.42±0.007""")},
    "T6": {"title": "Batch size", "data": AUTO, "rows": ablate(  # the paper prints 0.88285±0011
        ("batch 8", {"batch_size": 8}, "0.88285±0.0011 0.8844±0.0009"),
        ("batch 16", {}, BASE_AUTO),
        ("batch 32", {"batch_size": 32}, "0.8648±0.0005 0.889±0.0064"))},
    "T7": {"title": "Epochs of pretraining", "data": AUTO, "rows": ablate(
        ("50 epochs", {"epochs": 0.5}, "0.8521±0.0007 0.8765±0.0021"),
        ("100 epochs", {}, BASE_AUTO),
        ("200 epochs", {"epochs": 2}, "0.8766±0.001 0.9053±0.008"),
        ("300 epochs", {"epochs": 3}, "0.8777±0.004 0.9091±8.2e-5"))},
    "T8": {"title": "Augmentations", "data": AUTO, "rows": ablate(
        ("CASS only", {}, BASE_AUTO),
        ("+ solarize", {"augment": "solarize"}, "0.8551±0.0004 0.81455±0.002"),
        ("+ blur", {"augment": "blur"}, "0.864±4.2e-05 0.8604±0.0029"),
        ("+ blur, solarize", {"augment": "blur+solarize"}, "0.8573±2.59e-05 0.8513±0.0066"))},
    "T9": {"title": "Optimiser of the CNN", "data": AUTO, "rows": ablate(
        ("Adam", {}, BASE_AUTO),
        ("SGD", {"cnn_optimizer": "sgd"}, "0.8648±0.0005 0.82355±0.0064"))},
    "T10": {"title": "Transformer", "data": AUTO, "rows": ablate(
        ("ViT-B/16", {}, "0.8650±0.001 0.8894±0.005"),
        ("ViT-L/16", {"transformer": VIT_L}, "0.8481±0.001 0.853±0.004"))},
    "T11": {"title": "Supervised, for T10", "data": AUTO, "rows": ablate(
        ("ResNet-50", {"cnn": R50}, "0.83895±0.007"), ("ViT-B/16", {"cnn": VIT}, "0.8420±0.009"),
        ("ViT-L/16", {"cnn": VIT_L}, "0.80495±0.0077"), method="supervised")},
    "T12": {"title": "CNN", "data": AUTO, "rows": ablate(
        ("ResNet-18", {"cnn": R18}, "0.8674±4.8e-5 0.8773±5.29e-5"),
        ("ResNet-50", {}, "0.8680±0.001 0.8894±0.0005"),
        ("ResNet-200, random start", FROM_RANDOM, "0.8517±0.0009 0.874±0.0006"))},
    "T13": {"title": "Supervised, for T12", "data": AUTO, "rows": ablate(
        ("ResNet-18", {"cnn": R18}, "0.8499±0.0004"),
        ("ResNet-50", {"cnn": R50}, "0.83895±0.007"),
        ("ResNet-200, random start", {"cnn": R200, "init": "random"}, "0.833±0.0005"),
        method="supervised")},
    "T14": {"title": "Batch size", "data": BRAIN, "rows": ablate(
        ("batch 8", {"batch_size": 8}, "0.9895±0.0025 0.93158±0.0109"),
        ("batch 16", {}, BASE_BRAIN),
        ("batch 32", {"batch_size": 32}, "0.9848±0.011 0.9176±0.006"))},
    "T15": {"title": "Epochs of pretraining", "data": BRAIN, "rows": ablate(
        ("50 epochs", {"epochs": 0.5}, "0.9795±0.0109 0.9262±0.0181"),
        ("100 epochs", {}, BASE_BRAIN),
        ("200 epochs", {"epochs": 2}, "0.9864±0.008 0.9476±0.0012"),
        ("300 epochs", {"epochs": 3}, "0.9920±0.001 0.9484±0.017"))},
    "T16": {"title": "CNN", "data": BRAIN, "rows": ablate(
        ("ResNet-18", {"cnn": R18}, "0.9913±0.002 0.9801±0.007"),
        ("ResNet-50", {}, BASE_BRAIN),
        ("ResNet-200, random start", FROM_RANDOM, "0.9898±0.005 0.9276±0.017"))},
    "T17": {"title": "Transformer", "data": BRAIN, "rows": ablate(
        ("DeiT-B/16", {"transformer": DEIT}, "0.9902±0.0025 0.9844±0.0048"),
        ("ViT-B/16", {}, BASE_BRAIN),
        ("ViT-L/16", {"transformer": VIT_L}, "0.98945±2.45e-5 0.8896±0.0009"))},
    "T18": {"title": "Two CNNs", "data": BRAIN, "rows": ablate(
        ("ResNet-50, ViT-B/16 (paper: 7 h 11)", {}, BASE_BRAIN),
        ("ResNet-50, DenseNet-161 (paper: 5 h 24)", {"transformer": DENSENET},
         "0.9743±8.8e-5 0.98365±9.63e-5"))},
    "T19": {"title": "Two Transformers", "data": BRAIN, "rows": ablate(
        ("ResNet-50, ViT-B/16 (paper: 7 h 11)", {}, BASE_BRAIN),
        ("Swin-B, ViT-B/16 (paper: 10 h)", {"cnn": SWIN}, "0.9883±1.26e-5 0.94±8.12e-5"))},
    "T20": {"title": "Start weights", "data": BRAIN, "rows": ablate(
        ("random", {"init": "random"}, "0.9907±0.009 0.9316±0.027"),
        ("ImageNet", {"init": "imagenet"}, BASE_BRAIN))},
    "T21": {"title": "Function on the outputs", "data": AUTO, "rows": ablate(
        ("none", {}, BASE_AUTO),
        ("sigmoid", {"outputs": "sigmoid"}, "0.8296±0.00024 0.8322±0.004"),
        ("softmax", {"outputs": "softmax"}, "0.8188±0.0001 0.8093±0.00011"))},
}
