"""What a reader of the numbers has to know of the cases."""

from __future__ import annotations

from benchmarks.report.found import Found, seconds


def notes(found: Found) -> str:
    size = found.results["size"]
    setup = found.stages("sklearn").get("set-up")
    setup_text = f" (here {seconds(setup)} s)" if setup else ""
    notes = [
        "**Which peer time counts.** Where a peer has several ways (batch sizes, calls), each is measured and the "
        "ratio "
        "is with its fastest.",
        "**Conjugate gradients** are ours, in `benchmarks/workers/cg.py`, and meant to be good: products from the "
        "cached "
        "layer inputs and output gradients, all right-hand sides together, each leaving the batch when it has "
        "converged, "
        f"float32 with restarts from a float64 residual. {size['cg_tests']} tests are solved to a relative residual of "
        f"1e-6 and the time is scaled to {size['n_test']}; the cost of a right-hand side hardly depends on their "
        f"number "
        "at this width.",
        "**kronfluence** fits EK-FAC factors on labels sampled from the model (its default), with whole data sets as "
        "batches, as its example for small data does, and with batches of a tenth. It writes its factors and scores "
        "to a "
        "temporary folder, which its interface always does. Its declared torchvision is not installed; the measured "
        "calls do not import it.",
        "**pyDVL** is asked for `influence_factors` of the tests and then for `influences_from_factors`, which "
        "solves once; `influences` on whole data sets, or its chunked calculators, solve several times over. What it "
        "does with the train rows after the solve is not scaled to all tests, which favours it. It declares numpy < 2 "
        f"and runs here on the numpy above. Its loader gives batches of {size['n_train'] // 10:,}, for LiSSA of 50.",
        "**Its curvatures.** The Hessian need not be positive, and conjugate gradients are not defined where it has "
        'eigenvalues below -λ. Its "GAUSS_NEWTON" is the empirical Fisher, averaged so that the first batch of the '
        "loader counts 1/k of the others for k right-hand sides (nothing, for columns one by one); so is its harmonic "
        "mean. Ours run on the GGN, the nearest that is positive; our Arnoldi also on the Hessian, like for like.",
        f"**dattri's CG** has a tolerance that it ignores; as shipped it records every step for autograd "
        f"({size['few']} tests), so that it is also run under `torch.no_grad()` ({size['some']} tests). Its gradients "
        "of the train rows are not scaled to all tests.",
        "**LiSSA** at pyDVL's default scale and steps has not converged with any program: at λ = 0.01 and scale 10 a "
        "thousand steps leave (1 - 0.001)^1000 = 37% of the flattest directions missing. As ours sets itself it "
        "reaches its stated 1%.",
        "**dattri** draws its projection matrix again for every batch, so that all data are one batch, as in its MNIST "
        "scripts. Its SJLT needs a GPU. TRAK's λ is converted to its units (gradients divided by √d, sums over rows).",
        "**Sketched scores** come in two kinds: as published, which is the algebra of TRAK, and with the damping "
        "corrected for the sketch (the default), which needs all eigenvalues of the m × m matrix.",
        f"**scikit-learn** builds a sparse matrix once{setup_text}; the ratio leaves that out, and the time of our own "
        "hash is in.",
        "**Exact** means exact for the empirical Fisher with the damping given; which curvature predicts retraining "
        "best "
        "is another question, which the timings do not answer.",
    ]
    return "## Notes\n\n" + "\n".join(f"- {note}" for note in notes)
