"""Sizes of the paper's four models with TPA (table 9), of which `PAPER_SIZES` are made: 16,384 tokens each."""

HEADS = {768: 34, 1024: 47, 1280: 61, 1600: 78}  # by d_model
FFN_WIDTHS = {768: 2048, 1024: 2752, 1280: 3456, 1600: 4288}  # 8/3 of d_model, rounded up to 64
