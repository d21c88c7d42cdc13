"""timm-decor publish: brings what was trained to the Hub.

    timm-decor publish output/RUN --repo-id me/resnet18-flowers --dry-run staged   # look at it first
    timm-decor publish output/RUN --repo-id me/resnet18-flowers                    # then upload it
    timm-decor publish output --repo-id me                                         # every run: me/<model>.<tag>
    timm-decor publish --space --repo-id me/demo                                   # the demo of the project's weights

Nothing is uploaded that is not in the folder that --dry-run writes. docs/publishing.md has the whole story.
"""

from __future__ import annotations

import argparse
import functools
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from huggingface_hub.utils import HFValidationError, validate_repo_id

from timm_decor.errors import UserError, first_line, message
from timm_decor.publishing import card, repository, space
from timm_decor.publishing.args import LICENSE, publish_parser, refuse_others
from timm_decor.publishing.trained import Trained, find, read, with_twin
from timm_decor.publishing.upload import Target, log_in, upload
from timm_decor.training.keeping.folder import RunFolder


def main(argv: Sequence[str], prog: str = "hub.publish") -> None:
    """Publish.

    Args:
        argv: the command line.
        prog: the program, for messages.

    Raises:
        UserError: anything that the person who called can put right, in one line. Of several models, those that can be
            published are, before that.
    """
    args = publish_parser(prog).parse(argv)
    refuse_others(args)
    if args.space:
        _publish_space(args)
    else:
        _publish_trained(args, prog)


def _publish_space(args: argparse.Namespace) -> None:
    _check_id("--repo-id", _owned(args.repo_id))
    write = functools.partial(space.write, requirement=args.requirement)
    if args.dry_run:
        print(_replace(Path(args.dry_run), space.FILES, write, args.repo_id))
        return
    log_in(args.repo_id)
    with tempfile.TemporaryDirectory() as temporary:
        write(Path(temporary))
        print(upload(space.contents(Path(temporary)), _target(args, args.repo_id)))


def _publish_trained(args: argparse.Namespace, prog: str) -> None:
    found = find(Path(args.checkpoint))
    trained = [read(path) for path in found]  # all of them, before anything is written anywhere
    several = len(trained) > 1
    if several and ("/" in args.repo_id or args.tag):
        raise UserError(f"{args.checkpoint} holds {len(trained)} models: --repo-id OWNER alone, and no --tag")
    if several and args.twin:
        raise UserError(f"{args.checkpoint} holds {len(trained)} models: --twin is of one, so publish them one by one")
    if args.twin:
        trained = [with_twin(trained[0], Path(args.twin))]
    names = [_owned(args.repo_id) if not several else f"{args.repo_id}/{one.architecture}.{one.tag}" for one in trained]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise UserError(
            f"{args.checkpoint} holds two models that would both be {twice}: publish them one by one, with --tag"
        )
    for name in names:
        _check_id("--repo-id", name)
    if not args.dry_run:
        log_in(names[0])  # before the evaluation, which may take long
    failures = []
    for one, name in zip(trained, names, strict=True):
        try:
            options = _options(args, one)
            if args.dry_run:
                place = Path(args.dry_run) / name.rsplit("/", 1)[-1] if several else Path(args.dry_run)
                print(stage(one, place, name, options))
            else:
                with tempfile.TemporaryDirectory() as temporary:
                    stage(one, Path(temporary) / "repository", name, options)
                    print(upload(repository.contents(Path(temporary) / "repository"), _target(args, name)))
        except UserError as error:
            if not several:
                raise
            failures.append(name)
            print(f"{prog}: {name} is left out: {message(error)}", file=sys.stderr)
    if failures:
        raise UserError(f"{len(failures)} of {len(names)} models were not published: {failures[0]}, ...")


def _target(args: argparse.Namespace, repo_id: str) -> Target:
    return Target(repo_id, args.private, args.revision, args.create_pr)


def _owned(repo_id: str) -> str:
    if "/" not in repo_id:
        raise UserError(f"--repo-id {repo_id}: say OWNER/NAME")
    return repo_id


def _check_id(flag: str, name: str) -> None:
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"{flag} {name}: {first_line(error)}") from error


def _options(args: argparse.Namespace, trained: Trained) -> repository.Options:
    base_model = args.base_model or trained.base_model
    if base_model not in (None, "none"):
        _check_id("--base-model", base_model)
    if trained.began_with and not base_model:
        began = " ".join(trained.began_with)
        raise UserError(
            f"{trained.checkpoint} began with weights ({began}): say by --base-model what they are, or none"
        )
    if trained.began_with and not args.license:
        raise UserError(f"{trained.checkpoint} began with somebody's weights, whose license decides: say --license")
    if args.samples and args.no_eval:
        raise UserError("--samples are images that are evaluated: leave out --no-eval")
    return repository.Options(
        tag=args.tag or trained.tag,
        license=args.license or LICENSE,
        half=args.half,
        base_model=None if base_model == "none" else base_model,
        with_r=not args.no_r,
        data_dir=args.data_dir,
        evaluate=not args.no_eval,
        samples=args.samples,
    )


def stage(trained: Trained, folder: Path, repo_id: str, options: repository.Options) -> str:
    """Write a repository's files, replacing those of an earlier attempt.

    Returns:
        What is in the folder, a line a file.

    Raises:
        UserError: the folder holds other files, or see `repository.write`.
    """

    def write(fresh: Path) -> None:
        results = repository.write(trained, fresh, options)
        RunFolder(fresh).write_text(repository.CARD, card.render(trained, results, options, repo_id, fresh))

    return _replace(folder, repository.FILES, write, repo_id)


def _replace(folder: Path, files: Sequence[str], write: Callable[[Path], None], repo_id: str) -> str:
    """Let files be written, and put them in the place of those of an earlier attempt.

    Args:
        folder: where to; made if need be.
        files: the names that they may have.
        write: writes them into an empty folder.
        repo_id: for the first line of what is returned.

    Returns:
        What is in the folder, a line a file.

    Raises:
        UserError: the folder holds other files, or what `write` raises; it is then what it was.
    """
    strangers = [file.name for file in folder.iterdir() if file.name not in files] if folder.is_dir() else []
    if strangers:
        raise UserError(f"{folder} holds {strangers[0]}, which is not of a publication: take an empty or new folder")
    with tempfile.TemporaryDirectory() as temporary:
        write(Path(temporary))
        RunFolder(folder)  # made, and tested for writing
        for name in files:
            (folder / name).unlink(missing_ok=True)
        for file in sorted(Path(temporary).iterdir()):
            shutil.move(file, folder / file.name)
    sizes = [f"  {file.name}: {file.stat().st_size:,} bytes" for file in sorted(folder.iterdir())]
    return "\n".join([f"{repo_id}: in {folder}", *sizes])
