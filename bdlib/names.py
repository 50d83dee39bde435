"""What exists, by name, without torch: for plans of runs and for --help.  The tests keep it equal to what does the work."""

# Notebook -> the paper that it is about.
PAPERS = {
    "00_backdoors": "-",
    "01_linf_pruning": "arXiv:2002.12162",
    "02_awm": "arXiv:2207.04497",
    "03_rnp": "arXiv:2305.14876",
    "04_cbd": "arXiv:2303.06818",
    "05_ft_sam": "arXiv:2304.11823",
    "06_all_five": "-",
}
# As in attacks.catalog.  Those that change no label poison images of the target class alone.
ATTACKS = (
    "badnets",
    "badnets_grid",
    "badnets_4x4",
    "badnets_corners",
    "l0_inv",
    "trojan_3x3",
    "trojan_square",
    "trojan_watermark",
    "blended",
    "blended_picture",
    "l2_inv",
    "signal",
    "signal_rnp",
    "signal_cbd",
    "wanet",
    "adaptive_blend",
    "adaptive_patch",
    "sig",
    "sig_rnp",
    "trojannn",
    "lf",
    "label_consistent",
    "input_aware",
    "lira",
    "ssba",
)
CLEAN_LABEL = ("sig", "sig_rnp", "label_consistent")
# As in models.ARCHS.
NETWORKS = (
    "preact_resnet18",
    "resnet18",
    "resnet34",
    "resnet50",
    "wrn_16_1",
    "wrn_28_1",
    "wrn_28_2",
    "wrn_28_4",
    "wrn_28_10",
    "vgg_small",
    "vgg19_bn",
    "alexnet",
    "mobilenet_v2",
    "shufflenet_v2",
    "densenet121",
    "efficientnet_b0",
    "vit_b_16",
)
# Training images of each class in the datasets that need no file.
EMBEDDED = {
    "signs": (509, 503, 505, 468, 494, 502, 508, 506, 508, 497),
    "digits": (143, 146, 142, 147, 145, 146, 145, 144, 140, 144),
}
