"""``privatelora-edge doctor``: what is wrong between this edge and a cloud, and how to mend it."""

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edge_client.flags import (
    AdapterName,
    AsJson,
    CacheDir,
    ClientCert,
    ClientKey,
    Cloud,
    ConfigFile,
    Debug,
    FingerprintHex,
    PlanName,
    Tls,
    TlsCa,
    TokenFile,
    one_line_errors,
)

if TYPE_CHECKING:
    from edge_client.doctor.finding import Finding


def doctor(
    cloud: Cloud = None,
    tls: Tls = None,
    tls_ca: TlsCa = None,
    token_file: TokenFile = None,
    client_cert: ClientCert = None,
    client_key: ClientKey = None,
    adapter: AdapterName = None,
    plan: PlanName = None,
    fingerprint: FingerprintHex = None,
    measure_link: Annotated[
        bool, typer.Option("--link/--no-link", help="Measure the link too; some seconds.")
    ] = True,
    cache_dir: CacheDir = None,
    as_json: AsJson = False,
    config: ConfigFile = None,
    debug: Debug = False,
) -> None:
    """Look at everything between this machine and a cloud, and say how to mend what is wrong.

    Name, port, TLS, token, clock, versions, model, adapter, folders, link. Takes the flags and
    settings of the command that does not work. Sends random numbers only. Ends with 1 if anything has failed.
    """
    flags: dict[str, Any] = {"cloud": cloud, "tls": tls, "tls_ca": tls_ca, "token_file": token_file}
    flags |= {"client_cert": client_cert, "client_key": client_key, "adapter": adapter, "plan": plan}
    with one_line_errors(debug):
        from edge_client.config import load_config

        settings = load_config(config, **flags, fingerprint=fingerprint, cache_dir=cache_dir)
        from edge_client.doctor.examination import addresses, examine

        reports = []
        for address in addresses(settings):
            findings = []
            if not as_json:
                print(f"{address}:")
            for finding in examine(settings, address, with_link=measure_link):
                findings.append(finding)
                if not as_json:
                    _show(finding)
            usable = all(found.verdict != "failed" for found in findings)
            checks = [found.to_json() for found in findings]
            reports.append({"cloud": address, "ok": usable, "checks": checks})
            if not as_json:
                print(f"{address} {'can be used' if usable else 'cannot be used yet'}")
        if as_json:
            print(json.dumps({"ok": all(report["ok"] for report in reports), "clouds": reports}))
        if not all(report["ok"] for report in reports):
            raise typer.Exit(1)


def _show(finding: "Finding") -> None:
    from edge_client.plain import printable

    print(f"  {finding.verdict:8} {finding.check:10} {printable(finding.says)}", flush=True)
    if finding.fix:
        print(f"  {'':8} {'':10} fix: {printable(finding.fix)}", flush=True)
