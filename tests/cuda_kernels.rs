//! What the assembler said of the CUDA kernels that are embedded: none spills
//! registers to memory on Hopper, for which they are made, and none much elsewhere.

use distkv::device::cuda::images::{IMAGES, WITHOUT_KERNELS};

/// One kernel of one architecture in a report.
struct Kernel<'a> {
    name: &'a str,
    arch: &'a str,
    stack: u32,
    spills: u32,
    registers: u32,
}

fn number(text: &str, before: &str) -> Option<u32> {
    text.split(before).next()?.rsplit([' ', ',']).find(|word| !word.is_empty())?.parse().ok()
}

fn kernels(report: &str) -> Vec<Kernel<'_>> {
    let mut found = Vec::new();
    let mut name = None;
    let (mut stack, mut spills) = (0, 0);
    for line in report.lines() {
        if let Some(rest) = line.split("Compiling entry function '").nth(1) {
            let mut words = rest.split('\'');
            name = Some((words.next().unwrap_or_default(), words.nth(1).unwrap_or_default()));
        } else if line.contains("bytes stack frame") {
            stack = number(line, " bytes stack frame").expect("a number");
            spills = number(line, " bytes spill stores").expect("a number");
        } else if line.contains("Used ") && line.contains(" registers") {
            let registers = number(line, " registers").expect("a number");
            if let Some((name, arch)) = name.take() {
                found.push(Kernel { name, arch, stack, spills, registers });
            }
        }
    }
    found
}

/// Bytes that a kernel may spill where it is not at home.
const ELSEWHERE: u32 = 128;

#[test]
fn no_kernel_spills() {
    assert!(!IMAGES.is_empty(), "there are no kernels to look at: {WITHOUT_KERNELS}");
    let mut count = 0;
    for image in IMAGES {
        let found = kernels(image.report);
        assert!(!found.is_empty(), "{}: no report in {:?}", image.name, image.report);
        for kernel in found {
            let Kernel { name, arch, stack, spills, registers } = kernel;
            let most = if arch == "sm_90a" { 0 } else { ELSEWHERE };
            assert!(spills <= most, "{name} for {arch} spills {spills} bytes");
            assert!(stack <= most, "{name} for {arch} keeps {stack} bytes on a stack");
            assert!(registers <= 255, "{name} for {arch}: {registers} registers");
            count += 1;
        }
    }
    assert!(count > 100, "only {count} kernels were compiled");
}
