"""Stages that make manifests: `opd data STAGE`. Each maps records of one manifest to records of another, resumably."""
