// The model of this folder, checked and used from Swift, against onnxruntime's Objective-C API (Swift package
// onnxruntime-swift-package-manager, or the pod onnxruntime-objc).
//
//     let model = try EcqxModel(folder: Bundle.main.resourceURL!.appendingPathComponent("model"))
//     let checks = model.selfCheck()                 // does this device compute what was computed when the folder was made?
//     let best = try model.predict(model.raw(from: cgImage))[0]

import CryptoKit
import Foundation
#if canImport(CoreGraphics)
import CoreGraphics
#endif
#if canImport(OnnxRuntimeBindings)
import OnnxRuntimeBindings
#else
import onnxruntime_objc
#endif

/// manifest.json, as far as this program needs it.
struct Manifest: Decodable {
    struct File: Decodable { let file: String; let sha256: String; let bytes: Int; let float32_bytes: Int? }
    struct Input: Decodable { let name: String; let dtype: String }
    struct Output: Decodable { let name: String; let dtype: String; let tolerance: Double; let raw_tolerance: Double }
    struct Entry: Decodable { let file: String; let dtype: String; let shape: [Int]; let sha256: String }
    struct Case: Decodable { let raw: Entry?; let inputs: [Entry]; let outputs: [Entry] }
    struct Golden: Decodable { let preprocessing_tolerance: Double; let cases: [Case] }
    struct Raw: Decodable { let dtype: String; let shape: [Int] }
    struct Preprocessing: Decodable { let kind: String; let scale: Double; let mean: [Double]; let std: [Double]; let spectrum: Spectrum? }

    let model: File
    let inputs: [Input]
    let outputs: [Output]
    let labels: [String]
    let preprocessing: Preprocessing?
    let raw: Raw?
    let golden: Golden
}

/// Values in C order, little-endian. dtype: numpy's name.
struct Tensor {
    let dtype: String
    let shape: [Int]
    var data: Data

    var count: Int { shape.reduce(1, *) }

    /// All values, widened.
    var values: [Double] {
        switch dtype {
        case "float32": return read(Float.self).map(Double.init)
        case "float64": return read(Double.self)
        case "int64": return read(Int64.self).map(Double.init)
        case "int32": return read(Int32.self).map(Double.init)
        case "int16": return read(Int16.self).map(Double.init)
        case "int8": return read(Int8.self).map(Double.init)
        default: return data.map(Double.init)
        }
    }

    private func read<T>(_ type: T.Type) -> [T] {
        data.withUnsafeBytes { bytes in
            (0..<count).map { bytes.loadUnaligned(fromByteOffset: $0 * MemoryLayout<T>.stride, as: type) }
        }
    }

    init(dtype: String, shape: [Int], data: Data) {
        self.dtype = dtype
        self.shape = shape
        self.data = data
    }

    init(_ values: [Float], shape: [Int]) {
        self.init(dtype: "float32", shape: shape, data: values.withUnsafeBytes { Data($0) })
    }

    /// max |a - b|; infinite for other shapes and types, and for what is no number.
    func difference(from other: Tensor) -> Double {
        guard dtype == other.dtype, shape == other.shape else { return .infinity }
        return zip(values, other.values).reduce(0) { worst, pair in
            let delta = abs(pair.0 - pair.1)
            return delta.isNaN ? .infinity : max(worst, delta)
        }
    }
}

struct EcqxError: Error, CustomStringConvertible {
    let description: String
}

final class EcqxModel {
    struct Check { let name: String; let ok: Bool; let sentence: String }
    struct Prediction { let label: String; let probability: Double }

    let manifest: Manifest
    let loadSeconds: Double
    private let folder: URL
    private let environment: ORTEnv
    private let session: ORTSession

    init(folder: URL) throws {
        self.folder = folder
        manifest = try JSONDecoder().decode(Manifest.self, from: Data(contentsOf: folder.appendingPathComponent("manifest.json")))
        let content = try Data(contentsOf: folder.appendingPathComponent(manifest.model.file))
        guard Self.sha256(content) == manifest.model.sha256 else {  // a runtime may load damaged weights without a word
            throw EcqxError(description: "\(manifest.model.file) was changed: its sha256 is another; deploy it again")
        }
        environment = try ORTEnv(loggingLevel: .error)
        let options = try ORTSessionOptions()
        try options.setIntraOpNumThreads(1)
        let start = Date()
        session = try ORTSession(env: environment, modelPath: folder.appendingPathComponent(manifest.model.file).path, sessionOptions: options)
        loadSeconds = Date().timeIntervalSince(start)
    }

    /// Tensors in the order of the manifest's inputs -> tensors in the order of its outputs.
    func run(_ inputs: [Tensor]) throws -> [Tensor] {
        var feeds: [String: ORTValue] = [:]
        for (input, tensor) in zip(manifest.inputs, inputs) {
            feeds[input.name] = try ORTValue(
                tensorData: NSMutableData(data: tensor.data),
                elementType: Self.elementType(tensor.dtype),
                shape: tensor.shape.map { NSNumber(value: $0) }
            )
        }
        let found = try session.run(withInputs: feeds, outputNames: Set(manifest.outputs.map(\.name)), runOptions: nil)
        return try manifest.outputs.map { output in
            guard let value = found[output.name] else { throw EcqxError(description: "the runtime gave no output '\(output.name)'") }
            let shape = try value.tensorTypeAndShapeInfo().shape.map(\.intValue)
            return Tensor(dtype: output.dtype, shape: shape, data: try value.tensorData() as Data)
        }
    }

    /// One raw sample (see `raw(from:)`) -> the likeliest classes first.
    func predict(_ raw: Tensor) throws -> [Prediction] {
        let scores = Array(try run([preprocess(raw)])[0].values)
        let highest = scores.max() ?? 0
        let powers = scores.map { exp($0 - highest) }
        let sum = powers.reduce(0, +)
        let areShares = scores.allSatisfy { $0 >= 0 } && abs(scores.reduce(0, +) - 1) < 1e-3
        return scores.indices
            .map { i in
                let label = i < manifest.labels.count ? manifest.labels[i] : "class \(i)"
                return Prediction(label: label, probability: areShares ? scores[i] : powers[i] / sum)
            }
            .sorted { $0.probability > $1.probability }
    }

    // MARK: - The self-check

    func selfCheck() -> [Check] {
        var checks = [guarded("file", checkFile)]
        let hasRaw = manifest.golden.cases.first?.raw != nil
        if hasRaw { checks.append(guarded("preprocessing", checkPreprocessing)) }
        checks.append(guarded("outputs") { try self.checkOutputs(fromRaw: false) })
        if hasRaw { checks.append(guarded("raw to output") { try self.checkOutputs(fromRaw: true) }) }
        return checks
    }

    /// Median seconds of one inference on one thread.
    func latency(runs: Int = 50) throws -> Double {
        let inputs = try manifest.golden.cases[0].inputs.map(load)
        for _ in 0..<5 { _ = try run(inputs) }
        let times: [Double] = try (0..<runs).map { _ in
            let start = DispatchTime.now().uptimeNanoseconds
            _ = try run(inputs)
            return Double(DispatchTime.now().uptimeNanoseconds - start) / 1e9
        }
        return times.sorted()[runs / 2]
    }

    private func guarded(_ name: String, _ check: () throws -> (Bool, String)) -> Check {
        do {
            let (ok, sentence) = try check()
            return Check(name: name, ok: ok, sentence: sentence)
        } catch {
            return Check(name: name, ok: false, sentence: String(describing: error))
        }
    }

    private func checkFile() throws -> (Bool, String) {
        let same = Self.sha256(try Data(contentsOf: folder.appendingPathComponent(manifest.model.file))) == manifest.model.sha256
        return (same, same ? "the model is the one that was deployed" : "the model was changed: its sha256 is another")
    }

    private func checkPreprocessing() throws -> (Bool, String) {
        var worst = 0.0
        for one in manifest.golden.cases {
            guard let raw = one.raw else { continue }
            worst = max(worst, try preprocess(load(raw)).difference(from: load(one.inputs[0])))
        }
        let limit = manifest.golden.preprocessing_tolerance
        return (worst <= limit, "largest difference of inputs \(worst), allowed \(limit)")
    }

    private func checkOutputs(fromRaw: Bool) throws -> (Bool, String) {
        var worst = [Double](repeating: 0, count: manifest.outputs.count)
        for one in manifest.golden.cases {
            var inputs = try one.inputs.map(load)
            if fromRaw, let raw = one.raw { inputs = [try preprocess(load(raw))] }
            for (i, found) in try run(inputs).enumerated() {
                worst[i] = max(worst[i], found.difference(from: try load(one.outputs[i])))
            }
        }
        let limits = manifest.outputs.map { fromRaw ? $0.raw_tolerance : $0.tolerance }
        return (zip(worst, limits).allSatisfy { $0 <= $1 }, "largest difference \(worst), allowed \(limits)")
    }

    private func load(_ entry: Manifest.Entry) throws -> Tensor {
        try load(entry, from: folder)
    }

    func load(_ entry: Manifest.Entry, from folder: URL) throws -> Tensor {
        let data = try Data(contentsOf: folder.appendingPathComponent(entry.file))
        guard Self.sha256(data) == entry.sha256 else { throw EcqxError(description: "\(entry.file) was changed: its sha256 is another") }
        return Tensor(dtype: entry.dtype, shape: entry.shape, data: data)
    }

    func modelSHA256() throws -> String {
        Self.sha256(try Data(contentsOf: folder.appendingPathComponent(manifest.model.file)))
    }

    static func sha256(_ data: Data) -> String {
        SHA256.hash(data: data).map { String(format: "%02x", $0) }.joined()
    }

    private static func elementType(_ dtype: String) throws -> ORTTensorElementDataType {
        switch dtype {
        case "float32": return .float
        case "int64": return .int64
        case "int32": return .int32
        case "int8": return .int8
        case "uint8": return .uInt8
        default: throw EcqxError(description: "onnxruntime's Objective-C API takes no inputs of type \(dtype)")
        }
    }

    // MARK: - Pictures and sounds -> raw samples

    #if canImport(CoreGraphics)
    /// The middle part with the model's aspect, resized with an antialiased triangle filter.
    func raw(from image: CGImage) throws -> Tensor {
        let (width, height) = (image.width, image.height)
        var rgba = [UInt8](repeating: 255, count: 4 * width * height)
        let space = CGColorSpace(name: CGColorSpace.sRGB)!
        let info = CGImageAlphaInfo.noneSkipLast.rawValue
        rgba.withUnsafeMutableBytes { pixels in
            let context = CGContext(
                data: pixels.baseAddress, width: width, height: height, bitsPerComponent: 8, bytesPerRow: 4 * width, space: space, bitmapInfo: info
            )
            context?.draw(image, in: CGRect(x: 0, y: 0, width: width, height: height))
        }
        return try raw(rgba: rgba, width: width, height: height)
    }
    #endif

    func raw(rgba: [UInt8], width: Int, height: Int) throws -> Tensor {
        guard let raw = manifest.raw, let preprocessing = manifest.preprocessing, preprocessing.kind == "image" else {
            throw EcqxError(description: "this model takes no images")
        }
        let (toHeight, toWidth, channels) = (raw.shape[0], raw.shape[1], raw.shape.count == 3 ? raw.shape[2] : 1)
        var image = [Int](repeating: 0, count: width * height * channels)
        for i in 0..<(width * height) {
            let (r, g, b) = (Int(rgba[4 * i]), Int(rgba[4 * i + 1]), Int(rgba[4 * i + 2]))
            if channels == 1 {
                image[i] = (r * 19595 + g * 38470 + b * 7471 + 0x8000) >> 16
            } else {
                image[3 * i] = r
                image[3 * i + 1] = g
                image[3 * i + 2] = b
            }
        }
        if width != toWidth || height != toHeight {
            let zoom = min(Double(width) / Double(toWidth), Double(height) / Double(toHeight))
            let (cutWidth, cutHeight) = (Double(toWidth) * zoom, Double(toHeight) * zoom)
            let (left, top) = ((Double(width) - cutWidth) / 2, (Double(height) - cutHeight) / 2)
            let across = Self.taps(width, from: left, to: min(Double(width), left + cutWidth), target: toWidth)
            let down = Self.taps(height, from: top, to: min(Double(height), top + cutHeight), target: toHeight)
            image = Self.resize(image, outer: height, length: width, inner: channels, taps: across)
            image = Self.resize(image, outer: 1, length: height, inner: toWidth * channels, taps: down)
        }
        // Data with fewer than 256 levels gets the image's spread over its own.
        if preprocessing.scale > 1 && preprocessing.scale < 255 {
            image = image.map { Int((Double($0) * preprocessing.scale / 255).rounded()) }
        }
        return Tensor(dtype: "uint8", shape: [1] + raw.shape, data: Data(image.map { UInt8($0) }))
    }

    /// 16 bit samples of the model's rate -> cut, or filled with zeros at the end.
    func raw(samples: [Int16]) throws -> Tensor {
        guard let raw = manifest.raw, manifest.preprocessing?.kind == "waveform" else {
            throw EcqxError(description: "this model takes no sounds")
        }
        let wanted = raw.shape[0]
        let filled = Array(samples.prefix(wanted)) + [Int16](repeating: 0, count: max(0, wanted - samples.count))
        return Tensor(dtype: "int16", shape: [1, wanted], data: filled.withUnsafeBytes { Data($0) })
    }

    private typealias Taps = (first: Int, weights: [Int])

    private static func taps(_ size: Int, from: Double, to: Double, target: Int) -> [Taps] {
        let start = Double(Float(from))
        let step = Double(Float(to) - Float(from)) / Double(target)
        let reach = max(1, step)
        return (0..<target).map { at in
            let centre = start + (Double(at) + 0.5) * step
            let first = max(0, Int(centre - reach + 0.5))
            let end = min(size, Int(centre + reach + 0.5))
            let weights = (first..<end).map { x in max(0, 1 - abs((Double(x) - centre + 0.5) * (1 / reach))) }
            let sum = weights.reduce(0, +)
            return (first, weights.map { Int(0.5 + $0 / sum * Double(1 << 22)) })
        }
    }

    private static func resize(_ image: [Int], outer: Int, length: Int, inner: Int, taps: [Taps]) -> [Int] {
        var out: [Int] = []
        out.reserveCapacity(outer * taps.count * inner)
        for o in 0..<outer {
            for tap in taps {
                for i in 0..<inner {
                    var sum = 1 << 21
                    for (t, weight) in tap.weights.enumerated() { sum += image[(o * length + tap.first + t) * inner + i] * weight }
                    out.append(min(255, max(0, sum >> 22)))
                }
            }
        }
        return out
    }

    // MARK: - Raw samples -> the model's input: x = raw / scale; waveforms may become spectra; x = (x - mean) / std

    func preprocess(_ raw: Tensor) throws -> Tensor {
        guard let settings = manifest.preprocessing else { throw EcqxError(description: "the manifest holds no preprocessing") }
        if settings.kind == "indices" { return raw }
        var shape = raw.shape
        let scale = Float(settings.scale)
        var x = raw.values.map { Float($0) / scale }
        if settings.kind == "image" {
            let (n, height, width) = (shape[0], shape[1], shape[2])
            let channels = shape.count == 4 ? shape[3] : 1
            let plane = height * width
            var planes = [Float](repeating: 0, count: x.count)
            for i in 0..<n {
                for c in 0..<channels {
                    for p in 0..<plane { planes[(i * channels + c) * plane + p] = x[(i * plane + p) * channels + c] }
                }
            }
            x = planes
            shape = [n, channels, height, width]
        } else if settings.kind == "waveform" {
            shape = [shape[0], 1, shape[1]]
            if let spectrum = settings.spectrum {
                x = spectrum.apply(x, count: shape[0], samples: shape[2])
                shape = [shape[0], 1, spectrum.frames(shape[2]), spectrum.bands]
            }
        }
        let inner = settings.spectrum != nil ? 1 : shape.dropFirst(2).reduce(1, *)
        let (mean, std) = (settings.mean.map { Float($0) }, settings.std.map { Float($0) })
        for i in x.indices {
            if !mean.isEmpty { x[i] -= mean[mean.count == 1 ? 0 : i / inner % mean.count] }
            if !std.isEmpty { x[i] /= std[std.count == 1 ? 0 : i / inner % std.count] }
        }
        return Tensor(x, shape: shape)
    }
}

/// Waveforms in [-1, 1] -> log-mel energies or MFCCs, computed in float64.
struct Spectrum: Decodable {
    let sample_rate: Int
    let frame_length: Int
    let hop: Int
    let fft_length: Int
    let mel_bands: Int
    let coefficients: Int
    let low_hz: Double
    let high_hz: Double
    let floor: Double

    var bands: Int { coefficients > 0 ? coefficients : mel_bands }

    func frames(_ samples: Int) -> Int { 1 + (samples - frame_length) / hop }

    func apply(_ x: [Float], count: Int, samples: Int) -> [Float] {
        let bins = fft_length / 2 + 1
        let turns = (0..<fft_length).map { 2 * Double.pi * Double($0) / Double(fft_length) }
        let (cosines, sines) = (turns.map { cos($0) }, turns.map { sin($0) })
        let window = (0..<frame_length).map { 0.5 - 0.5 * cos(2 * Double.pi * Double($0) / Double(frame_length)) }
        let filters = self.filters(bins)
        var out: [Float] = []
        for i in 0..<count {
            for frame in 0..<frames(samples) {
                let start = i * samples + frame * hop
                let part = (0..<frame_length).map { Double(x[start + $0]) * window[$0] }
                let power: [Double] = (0..<bins).map { bin in
                    var (real, imaginary) = (0.0, 0.0)
                    for t in 0..<frame_length {
                        real += part[t] * cosines[bin * t % fft_length]
                        imaginary -= part[t] * sines[bin * t % fft_length]
                    }
                    return real * real + imaginary * imaginary
                }
                let logs = filters.map { filter in log(zip(filter, power).reduce(0) { $0 + $1.0 * $1.1 } + floor) }
                for band in 0..<bands { out.append(Float(coefficients > 0 ? cosine(logs, band) : logs[band])) }
            }
        }
        return out
    }

    /// Coefficient i of the orthonormal DCT-II.
    private func cosine(_ logs: [Double], _ i: Int) -> Double {
        var sum = 0.0
        for (j, value) in logs.enumerated() { sum += value * cos(Double.pi * Double(i) * (Double(j) + 0.5) / Double(mel_bands)) }
        return sum * (2 / Double(mel_bands)).squareRoot() * (i == 0 ? 0.5.squareRoot() : 1)
    }

    /// Triangles whose corners are evenly spaced in mel, linear in Hz, of height 1.
    private func filters(_ bins: Int) -> [[Double]] {
        func mel(_ hertz: Double) -> Double { 2595 * log10(1 + hertz / 700) }
        func corner(_ i: Int) -> Double {
            let at = mel(low_hz) + (mel(high_hz) - mel(low_hz)) * Double(i) / Double(mel_bands + 1)
            return 700 * (pow(10, at / 2595) - 1)
        }
        return (0..<mel_bands).map { band in
            let (left, centre, right) = (corner(band), corner(band + 1), corner(band + 2))
            return (0..<bins).map { bin in
                let hertz = Double(bin) * (Double(sample_rate) / Double(fft_length))
                return max(0, min((hertz - left) / (centre - left), (right - hertz) / (right - centre)))
            }
        }
    }
}
