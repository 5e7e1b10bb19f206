// A job of `ecqx-onnx validate --device folder:PATH`, copied to this device -> result.json and outputs in its folder, to be copied back.
//
//     let job = FileManager.default.urls(for: .documentDirectory, in: .userDomainMask)[0].appendingPathComponent("job")
//     try EcqxJob(folder: job).run(model, runtime: "onnxruntime 1.32, iPhone 15") { print($0) }

import Foundation

struct EcqxJob {
    /// job.json (docs/devices.md of ecqx-onnx), as far as this program needs it.
    private struct Job: Decodable {
        let id: String
        let batches: [[Manifest.Entry]]
        let single: [Manifest.Entry]
        let latency_runs: Int
    }

    private struct Result: Encodable {
        struct Entry: Encodable { let file: String; let dtype: String; let shape: [Int]; let sha256: String }
        struct Latency: Encodable { let seconds: Double; let runs: Int }
        struct Failure: Encodable { let stage: String; let message: String }

        let version = 1
        let job: String
        let runtime: String
        let model_sha256: String
        let load_seconds: Double
        var batches: [[Entry]]?
        var latency: Latency?
        var error: Failure?
    }

    private let folder: URL
    private let job: Job

    init(folder: URL) throws {
        self.folder = folder
        job = try JSONDecoder().decode(Job.self, from: Data(contentsOf: folder.appendingPathComponent("job.json")))
    }

    /// log: told `3/40` after batch 3 of 40. What the runtime throws is the result as well.
    func run(_ model: EcqxModel, runtime: String, log: (String) -> Void = { _ in }) throws {
        let sha256 = try model.modelSHA256()
        var result = Result(job: job.id, runtime: runtime, model_sha256: sha256, load_seconds: model.loadSeconds)
        do {
            result.batches = try batches(model, log)
            result.latency = try latency(model)
        } catch {
            result.batches = nil
            result.error = Result.Failure(stage: "run", message: "\(error)")
        }
        try JSONEncoder().encode(result).write(to: folder.appendingPathComponent("result.json"), options: .atomic)
    }

    private func batches(_ model: EcqxModel, _ log: (String) -> Void) throws -> [[Result.Entry]] {
        let outputs = folder.appendingPathComponent("outputs")
        try FileManager.default.createDirectory(at: outputs, withIntermediateDirectories: true)
        var done: [[Result.Entry]] = []
        for (number, entries) in job.batches.enumerated() {
            let found = try model.run(entries.map { try model.load($0, from: folder) })
            done.append(try found.enumerated().map { i, tensor in
                let name = String(format: "outputs/%05d.%d.bin", number, i)
                try tensor.data.write(to: folder.appendingPathComponent(name))
                return Result.Entry(file: name, dtype: tensor.dtype, shape: tensor.shape, sha256: EcqxModel.sha256(tensor.data))
            })
            log("\(number + 1)/\(job.batches.count)")
        }
        return done
    }

    /// Of one sample; no float twin runs here, so that the report has no ratio.
    private func latency(_ model: EcqxModel) throws -> Result.Latency? {
        guard job.latency_runs > 0 else { return nil }
        let inputs = try job.single.map { try model.load($0, from: folder) }
        for _ in 0..<2 { _ = try model.run(inputs) }
        let times: [Double] = try (0..<job.latency_runs).map { _ in
            let start = Date()
            _ = try model.run(inputs)
            return Date().timeIntervalSince(start)
        }
        return Result.Latency(seconds: times.sorted()[times.count / 2], runs: times.count)
    }
}
